"""What a person sees while a study runs: a live bar with the time left, or a line per cell where there is no screen."""

from typing import Any

from quantlens.studies.text import duration


class Quiet:
    """Shows nothing; the base of the other displays, and what keeps the time. console: where sentences go.
    parallel: workers."""

    def __init__(self, console: Any = None) -> None:
        self.console = console
        self.total = self.ended = 0
        self.parallel = 1
        self._times: dict[str, list[float]] = {}

    def start(self, total: int) -> None:
        """The study begins; so many cells are planned."""
        self.total = total

    def working(self, what: str) -> None:
        """A cell begins, or a model is loaded."""

    def step(self, what: str, done: int, total: int) -> None:
        """Progress inside a cell."""

    def skipped(self, count: int) -> None:
        """Cells turned out to be finished already, by an earlier run."""
        self.ended = min(self.total, self.ended + count)

    def finished(self, kind: str, what: str, seconds: float, error: str | None = None) -> None:
        """A cell is in the store. `kind` groups cells that take about equally long."""
        self._times.setdefault(kind, []).append(seconds)
        self.ended = min(self.total, self.ended + 1)

    def message(self, text: str) -> None:
        """A sentence for the person."""
        if self.console is not None:
            self.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the screen as it is."""

    def left(self) -> float | None:
        """Seconds left, from the mean time of the cells so far (methods weigh equally); None when nothing ran yet."""
        means = {kind: sum(times) / len(times) for kind, times in self._times.items()}
        methods = [mean for kind, mean in means.items() if kind not in ("fp32", "inspection")] or list(means.values())
        return sum(methods) / len(methods) * (self.total - self.ended) / self.parallel if methods else None

    def left_text(self) -> str:
        """ "about 3 min 05 s left", or "" where that is not known or nothing is left."""
        left = self.left()
        return f"about {duration(left)} left" if left else ""


class Lines(Quiet):
    """One line per finished cell, for logs."""

    def start(self, total: int) -> None:
        super().start(total)
        self.message(f"{total} cells")

    def finished(self, kind: str, what: str, seconds: float, error: str | None = None) -> None:
        super().finished(kind, what, seconds, error)
        parts = [f"FAILED: {error}" if error else duration(seconds), self.left_text()]
        self.message(f"[{self.ended}/{self.total}] {what}: {', '.join(filter(None, parts))}")


class Live(Quiet):
    """A bar for the study and one for the cell that runs."""

    def __init__(self, console: Any) -> None:
        super().__init__(console)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
            transient=False,
        )
        self.study = self.progress.add_task("study", total=None, left="")
        self.cell = self.progress.add_task("", total=None, left="", visible=False)
        self._what = ""

    def start(self, total: int) -> None:
        super().start(total)
        self.progress.update(self.study, total=total)
        self.progress.start()

    def working(self, what: str) -> None:
        self._what = what
        self.progress.reset(self.cell, total=None, description=what, visible=True, left="")

    def step(self, what: str, done: int, total: int) -> None:
        self.progress.update(self.cell, description=f"{self._what}: {what}", completed=done, total=total)

    def skipped(self, count: int) -> None:
        super().skipped(count)
        self._show()

    def finished(self, kind: str, what: str, seconds: float, error: str | None = None) -> None:
        super().finished(kind, what, seconds, error)
        if error:
            self.message(f"{what} failed: {error}")
        self._show()

    def _show(self) -> None:
        self.progress.update(self.study, completed=self.ended, left=self.left_text())

    def stop(self) -> None:
        self.progress.update(self.cell, visible=False)
        self.progress.stop()


def display(progress: bool | Quiet) -> Quiet:
    """The display for a `progress` argument: True is a live bar on a terminal and lines elsewhere, both on stderr."""
    if isinstance(progress, Quiet):
        return progress
    if not progress:
        return Quiet()
    from rich.console import Console

    console = Console(stderr=True, markup=False, emoji=False)
    return Live(console) if console.is_terminal else Lines(console)
