"""`python -m stillroom`, `torchrun -m stillroom`, `accelerate launch -m stillroom`."""

from stillroom.cli.main import main

raise SystemExit(main())
