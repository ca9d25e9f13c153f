"""What runs and codecs are worth: samples drawn by number, held against data, and set side by side."""
