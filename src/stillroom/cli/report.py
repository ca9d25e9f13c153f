"""`stillroom report RUN`."""

from pathlib import Path

from stillroom.settings import Refusal


def run(word: str, arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: stillroom report RUN\n\nWrites RUN/report.html from what the run has so far.")
        return 0
    if len(arguments) != 1:
        raise Refusal("usage: stillroom report RUN")
    from stillroom.report import write_report

    print(write_report(Path(arguments[0])))
    return 0
