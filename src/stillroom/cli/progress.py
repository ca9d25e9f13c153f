"""How a run looks on a terminal: a bar with the time left, and the latest terms. Elsewhere, plain lines."""

import sys

from stillroom.train.watch import Lines, Silent, Watch, terms_of


class Bar(Silent):
    def started(self, name, step, steps):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", markup=False), console=Console(stderr=True),
        )
        self.progress.start()
        self.task = self.progress.add_task(name, total=steps, completed=step, terms="")

    def note(self, text):
        if hasattr(self, "progress"):
            self.progress.console.print(text, markup=False, highlight=False)  # above the bar
        else:
            print(text, file=sys.stderr)

    def row(self, row):
        terms = "  ".join(f"{k} {v:.3g}" for k, v in terms_of(row).items())
        self.progress.update(self.task, completed=row["step"], terms=f"{row['steps_per_second']:.1f}/s  {terms}")

    def ended(self):
        self.progress.stop()


def watch_for(quiet: bool) -> Watch:
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
