"""The fastest engine that agrees: candidates are checked against PyTorch, then measured here."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from service.errors import BackendFailed, CertificateFailed, InvalidConfig
from service.graph import Program
from service.serving.backends.accuracy import Accuracy, measure_accuracy, worst
from service.serving.backends.base import Backend, Description, Precision, Prepared, Streams
from service.serving.backends.choices import Choice, Choices, choice_key
from service.serving.backends.rows import checked_sizes, random_rows, signature

log = logging.getLogger(__name__)

MEASURED_ROWS = 8


class AutoBackend:
    """Keeps the fastest of its candidates that agrees with `reference` in float32.

    The first candidate is the default: others must beat it by a margin. In float32 the reference
    itself needs no check. What was chosen for a structure is remembered in `choices`, and then
    nothing else is even loaded.
    """

    name = "auto"

    def __init__(
        self,
        candidates: Sequence[Backend],
        reference: Backend,
        choices: Choices | None = None,
        threads: int = 0,
    ) -> None:
        """`threads` are the CPU threads that the choice is made for; 0 means this thread's."""
        self._candidates = tuple(candidates)
        self._reference = reference
        self._choices = choices or Choices()
        self._threads = threads

    def prepare(
        self,
        program: Program,
        device: str,
        precision: Precision,
        batch_sizes: Sequence[int],
        calibration: tuple[Tensor, ...] | None = None,
    ) -> Prepared:
        """Load `program` with every candidate that may be chosen; `warm` checks and chooses.

        With `calibration`, half of the rows set ranges and the other half are what the outcome is
        checked on. Raises BackendFailed when no candidate can run the program so; one that cannot
        is left out, and a note says why.
        """
        names = [candidate.name for candidate in self._candidates]
        key = choice_key(
            "backend",
            program,
            self._threads or torch.get_num_threads(),
            names,
            device,
            precision,
            max(batch_sizes),
        )
        _check_calibration(program, calibration)
        ranges, held_out = _halves(calibration)
        known = self._choices.get(key)
        wanted = [c for c in self._candidates if known is not None and c.name == known.name]
        for candidates in (wanted, self._candidates):
            prepared: dict[str, Prepared] = {}
            notes: dict[str, str] = {}
            failure: BackendFailed | None = None
            for each in candidates:
                try:
                    prepared[each.name] = each.prepare(
                        program, device, precision, batch_sizes, ranges
                    )
                except BackendFailed as error:
                    failure = error
                    notes[each.name] = f"{each.name} was left out: {error.detail}"
            if prepared:
                break
        else:
            raise failure or BackendFailed("There is no backend to choose from.")
        exact = precision == "float32"
        first = prepared.get(self._reference.name) if exact else None
        reference = first
        if reference is None:
            reference = self._reference.prepare(program, device, "float32", batch_sizes)
        return _Auto(
            precision, batch_sizes, prepared, reference, notes, self._choices, key, held_out
        )


def _check_calibration(program: Program, rows: tuple[Tensor, ...] | None) -> None:
    wanted = [spec.shape for spec in signature(program).inputs]
    given = None if rows is None else [tuple(column.shape[1:]) for column in rows]
    if given is not None and given != wanted:
        raise InvalidConfig(
            f"`calibration` has rows of shape {given}; the network takes {wanted}.",
            field="calibration",
        )


def _halves(
    rows: tuple[Tensor, ...] | None,
) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Every other row, and the rows in between."""
    if rows is None:
        return None, None
    return tuple(column[::2] for column in rows), tuple(column[1::2] for column in rows)


class _Auto:
    def __init__(
        self,
        precision: Precision,
        batch_sizes: Sequence[int],
        candidates: dict[str, Prepared],
        reference: Prepared,
        notes: dict[str, str],
        choices: Choices,
        key: str,
        held_out: tuple[Tensor, ...] | None,
    ) -> None:
        self.batch_sizes = checked_sizes(batch_sizes)
        self._precision = precision
        self._candidates = candidates
        self._reference: Prepared | None = reference
        self._notes = notes
        self._choices, self._key = choices, key
        self._held_out = held_out
        self._reference_tried = reference in candidates.values()
        self._accuracy: dict[str, Accuracy] = {}
        self._chosen = next(iter(candidates.values()))
        self._relative: dict[str, float] = {}
        self.inputs, self.outputs = self._chosen.inputs, self._chosen.outputs

    def warm(self) -> Iterator[None]:
        """Warm every candidate, drop those that disagree, measure the rest, keep one.

        Raises CertificateFailed, with the numbers, when none agrees.
        """
        errors: list[Exception] = []
        for name in list(self._candidates):
            try:
                yield from self._candidates[name].warm()
                yield from self._check(name)
            except CertificateFailed as error:
                self._leave_out(name, error.detail)
            except Exception as error:
                errors.append(error)
                self._leave_out(name, f"{name} was left out: {error}")
        if not self._candidates:
            yield from self._fall_back(errors)
        self._held_out = None
        choice = yield from self._choose()
        for name in self._candidates.keys() - {choice.name}:
            self._candidates.pop(name).close()
        self._chosen = self._candidates[choice.name]
        self._relative = dict(choice.relative)
        if self._reference is not None and self._reference is not self._chosen:
            self._reference.close()
        self._reference = None

    @property
    def streams(self) -> Streams | None:
        """Those of the engine that was chosen."""
        return self._chosen.streams

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Outputs for a batch of at most the largest prepared size."""
        return self._chosen.run(batch)

    def describe(self) -> Description:
        chosen = self._chosen.describe()
        accuracy = self._accuracy.get(chosen.backend)
        return replace(
            chosen,
            notes=(*chosen.notes, *self._notes.values()),
            candidates=self._relative,
            accuracy={} if accuracy is None else accuracy.to_dict(),
        )

    def close(self) -> None:
        for prepared in (self._reference, *self._candidates.values()):
            if prepared is not None:
                prepared.close()
        self._chosen.close()

    def _leave_out(self, name: str, why: str) -> None:
        log.warning("the backend %s was left out: %s", name, why)
        self._notes[name] = why
        left = self._candidates.pop(name)
        if left is not self._reference:
            left.close()

    def _check(self, name: str) -> Iterator[None]:
        """Raises CertificateFailed when a candidate's outputs are not those of the reference."""
        candidate, reference = self._candidates[name], self._reference
        assert reference is not None
        if candidate is reference:
            return
        found = yield from measure_accuracy(reference, candidate, self._precision, self._held_out)
        self._accuracy[name] = found
        if not found.passed:
            raise CertificateFailed(found.sentence() + ".", accuracy=found.to_dict())

    def _fall_back(self, errors: Sequence[Exception]) -> Iterator[None]:
        """Serve the reference where it computes what was asked for; else say what failed."""
        reference = self._reference
        if self._precision == "float32" and reference is not None and not self._reference_tried:
            self._candidates[reference.describe().backend] = reference
            yield from reference.warm()
            return
        failed = [accuracy for accuracy in self._accuracy.values() if not accuracy.passed]
        if not failed:
            raise errors[0]
        nearest = worst(failed)
        raise CertificateFailed(
            f"{nearest.sentence()}.",
            remedy="Ask for another `precision` in `config`; float32 is exact.",
            accuracy=nearest.to_dict(),
        )

    def _choose(self) -> Generator[None, None, Choice]:
        if len(self._candidates) == 1:
            (name,) = self._candidates
            known = self._choices.get(self._key)
            return known if known is not None and known.name == name else Choice(name, {})
        sizes = sorted({1, min(MEASURED_ROWS, self.batch_sizes[-1])})
        choice = yield from self._choices.choose(
            self._key,
            {name: candidate.run for name, candidate in self._candidates.items()},
            [random_rows(self.inputs, size) for size in sizes],
        )
        return choice
