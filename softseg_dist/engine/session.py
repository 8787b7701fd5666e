"""Sessions in the driver, of a search or of one fit: they pass events of the backend on to searcher, tracker and display.

Knows no Ray, so that the order of events can be read, and tested, without one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from softseg_dist.engine.context import RunContext
from softseg_dist.engine.progress import Progress
from softseg_dist.engine.worker import Ending, reason_of
from softseg_dist.errors import UserError, no_room, out_of_reach
from softseg_dist.interrupts import handled
from softseg_dist.places import Place
from softseg_dist.record.ledger import RaceRecord
from softseg_dist.search.searcher import MAX_ATTEMPTS, StudySearcher
from softseg_dist.study import Study
from softseg_dist.tracking.tracker import Tracker
from softseg_dist.training.task import FitResult, FitTask

HOPELESS = 3  # so many fits given up, and none ended: the cause is not the fit


@dataclass(frozen=True)
class Outcome:
    """Fits of the whole study, by how they stand after a session.

    `failed` ended without a score, or were given up after their processes died twice. `unfinished` would run next time.
    """

    finished: int
    failed: int
    unfinished: int
    interrupted: bool


def run_search(context: RunContext) -> Outcome:
    """Run every fit of the study that the ledger does not have yet; returns how the study stands then.

    The ledger must have the study open. The first Ctrl-C or SIGTERM lets fits write their checkpoints, the second stops at once.
    Raises UserError if another driver uses the run folder, the backend cannot run a fit, or `propose` or a fit reports a mistake
    of the user's. Fits that have ended stay recorded in every case.
    """
    with context.ledger.lock(), _stop_file(context) as stop_file:
        searcher = StudySearcher(context.study, context.splits, context.ledger, context.fit_task)
        session = SearchSession(searcher, context.tracker, context.progress, stop_file)
        try:
            session.start()
            if not session.ended:
                context.backend.run_fits(session, context)
        except KeyboardInterrupt:
            session.interrupted = True
        finally:
            context.progress.close()
        if session.error is not None:
            raise session.error
        return session.outcome()


def run_beside(context: RunContext, task: FitTask) -> FitResult:
    """Run a fit that is not one of the search, but as those run: with the same resources, and again if it is lost.

    Raises UserError on a mistake of the user's, and if the fit is lost `MAX_ATTEMPTS` times. Raises KeyboardInterrupt if it was
    interrupted: the same task then goes on from its checkpoint.
    """
    with context.ledger.lock(), _stop_file(context) as stop_file:
        session = OneFit(task, context.progress, stop_file)
        context.backend.run_fits(session, context)
    if session.error is not None:
        raise session.error
    if session.result is None:
        raise KeyboardInterrupt
    return session.result


@contextmanager
def _stop_file(context: RunContext) -> Iterator[Place]:
    stop_file = context.stop_file
    stop_file.delete()  # left by a session that was killed
    try:
        yield stop_file
    finally:
        stop_file.delete()


class Session(ABC):
    """What gives fits to a backend, and gets all their events, by an id of the backend's."""

    def __init__(self, progress: Progress, stop_file: Place) -> None:
        self.progress, self._stop_file = progress, stop_file
        self.error: UserError | None = None
        self.interrupted = False
        self._noted: set[str] = set()

    @property
    def stopped(self) -> bool:
        """Has it been interrupted, or met an error? Then it gives no more fits."""
        return self.interrupted or self.error is not None

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Nothing will be emitted any more."""

    @property
    def num_left(self) -> int:
        """How many fits are to be run, as far as that is known."""
        return 1

    @abstractmethod
    def next_fit(self, fit_id: str) -> FitTask | None:
        """The task of the next fit, which will be known as `fit_id`; None if there is nothing to start now."""

    @abstractmethod
    def epoch(self, fit_id: str, metrics: dict[str, float]) -> None:
        """A running fit has finished an epoch."""

    @abstractmethod
    def ended_as(self, fit_id: str, ending: Ending) -> None:
        """A fit no longer runs."""

    def announce_stop(self) -> bool:
        """Was the session asked to stop? The first call after that prints it."""
        if self.interrupted:
            self._note_once("stopping: running fits write their checkpoints; press Ctrl-C again to stop at once")
        return self.interrupted

    def stop(self) -> None:
        """Make all fits stop and emit no more. A signal handler calls this: it must not print or raise."""
        self.interrupted = True
        try:
            self._stop_file.write(b"stop\n")
        except OSError as error:
            self.error = self.error or _explained(error)

    def _note_once(self, text: str, content: str = "") -> None:
        """Print a note, unless one of the same `content` was printed before."""
        if (content or text) not in self._noted:
            self._noted.add(content or text)
            self.progress.note(text)


class OneFit(Session):
    """A session of one fit. Four lines tell of its epochs; `result` is what it has ended with."""

    def __init__(self, task: FitTask, progress: Progress, stop_file: Place) -> None:
        super().__init__(progress, stop_file)
        self.result: FitResult | None = None
        self._task, self._runs = task, False

    @property
    def ended(self) -> bool:
        return self.stopped or self.result is not None

    def next_fit(self, fit_id: str) -> FitTask | None:
        self.announce_stop()
        if self._runs or self.ended:
            return None
        self._runs = True
        return self._task

    def epoch(self, fit_id: str, metrics: dict[str, float]) -> None:
        epochs = self._task.recipe.optim.epochs
        if metrics["epoch"] % max(1, epochs // 4) == 0:
            where = f"epoch {metrics['epoch']:g} of {epochs}"
            name = self._task.key if self._task.split.test else f"{self._task.candidate} on all subjects"
            self.progress.note(f"{name}: {where}, loss {metrics['loss']:.4g}")

    def ended_as(self, fit_id: str, ending: Ending) -> None:
        task, self._runs, self.result = self._task, False, ending.result
        for note in ending.result.notes if ending.result else ():
            self._note_once(f"{task.key}: {note}", note)
        if ending.kind == "user_error":
            self.error = UserError(f"{task.key}: {ending.text}")
        elif ending.kind == "lost":
            self._task = task.replace(attempt=task.attempt + 1)
            if self._task.attempt == MAX_ATTEMPTS:
                last = reason_of(task, ending.text)
                self.error = UserError(f"{task.key}: lost {MAX_ATTEMPTS} times, the last time: {last}")


class SearchSession(Session):
    """The running fits of a search. Searcher, tracker and display get every event of theirs."""

    def __init__(self, searcher: StudySearcher, tracker: Tracker | None, progress: Progress, stop_file: Place) -> None:
        super().__init__(progress, stop_file)
        self.searcher, self.tracker = searcher, tracker
        self._running: dict[str, FitTask] = {}
        self._raced: set[str] = set()  # whose end by the race was reported
        self._num_ended = self._num_given_up = 0

    def start(self) -> None:
        """Pass the results of earlier sessions on to tracker and display."""
        done = [result for candidate in self.searcher.candidates.values() for result in candidate.results.values()]
        self.progress.start(self.searcher.num_planned, done)
        for name in self.searcher.candidates:
            self._report_planned(name)
        self._raced |= {name for name, candidate in self.searcher.candidates.items() if candidate.raced}
        if self.tracker is not None:
            ended = [name for name, candidate in self.searcher.candidates.items() if candidate.ended]
            self.tracker.recall(self.searcher.ledger, done, ended)

    @property
    def ended(self) -> bool:
        return self.stopped or self.searcher.ended

    @property
    def num_left(self) -> int:
        return self.outcome().unfinished

    def next_fit(self, fit_id: str) -> FitTask | None:
        """As `Session.next_fit`. A mistake in `propose` stops the session."""
        self.announce_stop()
        try:
            task = None if self.stopped else self.searcher.next_fit()
        except (UserError, OSError) as error:
            self._abort(_explained(error) if isinstance(error, OSError) else error)
            return None
        if task is None:
            return None
        self._running[fit_id] = task
        if task.candidate not in self.progress.planned_fits:
            self._report_planned(task.candidate)
        if self.tracker is not None:
            self.tracker.fit_started(task)
        return task

    def epoch(self, fit_id: str, metrics: dict[str, float]) -> None:
        key = self._running[fit_id].key
        self.progress.epoch(key, metrics)
        if self.tracker is not None:
            self.tracker.epoch(key, metrics)

    def ended_as(self, fit_id: str, ending: Ending) -> None:
        task = self._running.pop(fit_id)
        if ending.result is not None:
            assert ending.result.key == task.key
            self._record(task, ending.result)
        elif ending.kind == "lost":
            self._lost(task, ending.text if ending.blameless else reason_of(task, ending.text), ending.blameless)
        else:
            self.searcher.interrupt(task)
            self._stopped(task, "FAILED" if ending.kind == "user_error" else "KILLED")
            if ending.kind == "user_error":
                self._abort(UserError(f"{task.key}: {ending.text}"))
        self._report_decisions()

    def outcome(self) -> Outcome:
        """How the study stands."""
        candidates = self.searcher.candidates.values()
        states = [state for candidate in candidates for state in candidate.states.values()]
        finished = states.count("finished")
        failed = len(states) - finished + sum(len(candidate.lost) for candidate in candidates)
        return Outcome(finished, failed, self.searcher.num_planned - finished - failed, self.interrupted)

    def _abort(self, error: UserError) -> None:
        self.error = self.error or error
        try:
            self._stop_file.write(b"stop\n")
        except OSError as failed:
            self.progress.note(f"the stop file cannot be written, so the running fits go on to their end: {failed}")

    def _record(self, task: FitTask, result: FitResult) -> None:
        try:
            self.searcher.finish(result)
        except OSError as error:
            self.searcher.interrupt(task)  # what could not be recorded runs again, and finds its result in its folder
            self._stopped(task, "KILLED")
            self._abort(_explained(error))
            return
        self._num_ended += 1
        self.progress.finished(result)
        for note in result.notes:  # what a machine could not do, which is the same for many fits
            self._note_once(f"{task.key}: {note}", note)
        if self.tracker is not None:
            self.tracker.fit_ended(result)

    def _lost(self, task: FitTask, reason: str, blameless: bool) -> None:
        what_next = "given up; running the study again tries it again"
        if again := self.searcher.lose(task, reason, blameless):
            what_next = "trying again"
        elif self.searcher.candidates[task.candidate].raced:
            what_next = "given up, as its candidate is out of the race"
        self.progress.note(f"{task.key}: {reason}; {what_next}")
        self._stopped(task, None if again else "FAILED")
        self._num_given_up += not again
        if self._num_given_up >= HOPELESS and self._num_ended == 0:
            self._abort(UserError(f"the first {HOPELESS} fits all died, the last one, {task.key}, with: {reason}"))

    def _stopped(self, task: FitTask, status: str | None) -> None:
        self.progress.gone(task.key)
        if self.tracker is not None and status is not None:
            self.tracker.close_run(task.key, status)

    def _report_planned(self, name: str) -> None:
        self.progress.planned(name, self.searcher.candidates[name].num_planned, self.searcher.num_planned)

    def _report_decisions(self) -> None:
        """Report what followed from the last fit: the candidates that are out of the race, and those that have ended."""
        for candidate in self.searcher.changed():
            if candidate.raced is not None and candidate.name not in self._raced:
                self._raced.add(candidate.name)
                self._report_planned(candidate.name)
                self.progress.note(f"{candidate.name} is out of the race: {_verdict(candidate.raced, self.searcher.study)}")
            if candidate.note:
                self._note_once(f"{candidate.name}: {candidate.note}")
            if candidate.ended:
                if self.tracker is not None:
                    self.tracker.candidate_ended(candidate.name, list(candidate.results.values()), candidate.raced)
                candidate.results.clear()  # they take memory


def _verdict(record: RaceRecord, study: Study) -> str:
    """`brier_skill -0.0312 (p = 0.0041) against hard-dice over 3 splits`."""
    names = [metric.row.name for metric in study.objectives]
    differences = zip(names, (record.difference, record.second_difference), (record.p, record.second_p), strict=False)
    parts = ", ".join(f"{name} {mean:+.4f} (p = {p:.2g})" for name, mean, p in differences if mean is not None)
    return f"{parts} against {record.incumbent} over {record.after} splits"


def _explained(error: OSError) -> UserError:
    """Why the run folder cannot be written, as what stops the study; raises `error` again if it is about something else."""
    if (text := no_room(error) or out_of_reach(error)) is None:
        raise error
    return UserError(text)


def signals(session: Session) -> AbstractContextManager[None]:
    """The first signal of `ENDING` stops the session after checkpoints, the second one at once."""

    def stop(kind: int) -> None:
        if session.interrupted:
            raise KeyboardInterrupt
        session.stop()

    return handled(stop)
