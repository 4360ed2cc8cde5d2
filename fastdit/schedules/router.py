"""Routers: learned logits per (step, block, component), the files that hold them, and the schedules they give.

HarmoniCa (arXiv 2410.01723): r = sigmoid(logit); a component computes where r > tau and is reused elsewhere. The table
does not look at the input, so a threshold makes it a static :class:`~fastdit.Schedule`. A file is safetensors with one
float32 tensor ``logits.<block kind>`` [steps, blocks, components] in running order and JSON metadata, of version 2
where what is reused is forecast; reading one executes nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any

import numpy as np

from fastdit import files
from fastdit.checks import real
from fastdit.errors import ArgumentError, ScheduleError
from fastdit.schedules.conditions import Conditions
from fastdit.schedules.layer import check_kinds, check_names, check_order, check_steps
from fastdit.schedules.schedule import DEFAULT_KIND, Schedule
from fastdit.schedules.schedule_file import MAX_BITS, MAX_FILE_BYTES, dumps, expect
from fastdit.spec import ModelSpec

FORMAT = "fastdit.router"
VERSIONS = (1, 2)  # without and with an order of forecasts
#: the logit of what always computes; the bounds of all others (spec section 3)
LIMIT = 5.0
TAU = 0.1
_TENSOR = "logits."
_FACTS = {
    "format": str,
    "version": int,
    "components": dict,
    "family": (str, NoneType),
    "conditions": dict,
    "tau": (int, float),
    "provenance": dict,
}
_CONDITIONS = {
    "scheduler": (str, NoneType),
    "timesteps": (list, NoneType),
    "image_tokens": (int, NoneType),
    "guidance": (int, float, NoneType),
    "true_guidance": (int, float, NoneType),
    "noise": (str, NoneType),
}


@dataclass(frozen=True, eq=False)
class Router:
    """A router is a learned table.

    Attributes:
        logits: Block kind -> read-only float32 [steps, blocks, components], the first executed step first; inf where
            the model has no such component.
        components: Block kind -> names along the last axis.
        family: Model family it was trained on, or None if unknown.
        conditions: The runs it was trained for; fields are None where unknown.
        tau: The threshold it was trained with.
        provenance: Free JSON data about its origin.
        order: How its schedules draw what they reuse, as it was trained: 0 repeats, 1 and 2 extrapolate.
    """

    logits: Mapping[str, np.ndarray]
    components: Mapping[str, tuple[str, ...]]
    family: str | None = None
    conditions: Conditions = field(default_factory=Conditions)
    tau: float = TAU
    provenance: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    order: int = 0

    def __post_init__(self) -> None:
        check_tau(self.tau)
        check_order(self.order)
        check_kinds(logits=self.logits, components=self.components)
        logits, names = {}, {}
        for kind, given in self.logits.items():
            names[kind] = check_names(kind, self.components[kind])
            try:
                array = np.array(given, dtype=np.float32)
            except (TypeError, ValueError) as error:
                raise ScheduleError(f"logits of {kind!r} must be numbers: {error}") from error
            shaped = array.ndim == 3 and array.shape[2] == len(names[kind]) and 0 not in array.shape
            if not (shaped and (array > -np.inf).all()):
                raise ScheduleError(
                    f"logits of {kind!r} must be numbers of shape [steps, blocks, {len(names[kind])}] without empty "
                    f"axes, inf where the model has no such component, got {array.shape}"
                )
            array.setflags(write=False)
            logits[kind] = array
        if not any(np.isfinite(array).any() for array in logits.values()):
            raise ScheduleError("logits must be finite for at least one component, all are inf")
        check_steps("logits", {kind: len(array) for kind, array in logits.items()})
        object.__setattr__(self, "logits", MappingProxyType(logits))
        object.__setattr__(self, "components", MappingProxyType(names))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    # ---- facts

    @property
    def steps(self) -> int:
        """It has so many steps."""
        return len(next(iter(self.logits.values())))

    @property
    def entries(self) -> int:
        """The model has so many (step, block, component) triples, T N."""
        return sum(int(np.isfinite(array).sum()) for array in self.logits.values())

    @property
    def sha256(self) -> str:
        """This hash is over the logits and what they belong to, and an order above 0."""
        digest = hashlib.sha256(f"order {self.order}".encode() if self.order else b"")
        for kind, array in sorted(self.logits.items()):
            digest.update(repr((kind, self.components[kind], array.shape)).encode())
            digest.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        share = self.cache_utilisation(self.schedule())
        return f"Router({self.steps} steps, {share:.1%} reused at tau {self.tau:g})"

    def cache_utilisation(self, schedule: Schedule) -> float:
        """CUR is reused entries over T N, the first step and only what the model has included (spec section 8)."""
        reused = sum(
            int((~schedule.layers[kind].bits & np.isfinite(array)).sum())
            for kind, array in self.logits.items()
        )
        return reused / self.entries

    # ---- schedules

    def schedule(self, tau: float | None = None) -> Schedule:
        """The schedule at a threshold computes where sigmoid(logit) > tau, and at the first step.

        Args:
            tau: In [0, 1); the router's own if left out.

        Raises:
            ArgumentError: tau is not in [0, 1).
        """
        tau = self.tau if tau is None else check_tau(tau)
        with np.errstate(over="ignore"):
            bits = {
                kind: 1 / (1 + np.exp(-array.astype(np.float64))) > tau
                for kind, array in self.logits.items()
            }
        return self._schedule(bits, {"tau": tau})

    def sweep(
        self, targets: Sequence[float], macs: Mapping[str, np.ndarray] | None = None
    ) -> list[Schedule]:
        """This gives a schedule for each target: the entries with the least logits are reused, as many as reach it.

        Args:
            targets: Shares in [0, 1 - 1/T] of all entries, or of their arithmetic where `macs` weighs them. The nearest
                share that whole entries can make is taken; equal logits give way in running order.
            macs: Block kind -> multiply-accumulates [blocks, components] of one step.

        Raises:
            ArgumentError: A target is out of reach, or the weights do not fit the logits.
        """
        weights = {}
        for kind, array in self.logits.items():
            costs = np.ones(array.shape[1:]) if macs is None else np.asarray(macs[kind], float)
            if costs.shape != array.shape[1:] or (costs < 0).any():
                raise ArgumentError(
                    f"macs of {kind!r} must be numbers >= 0 of shape {array.shape[1:]}, got {costs.shape}"
                )
            weights[kind] = np.where(np.isfinite(array), costs, 0.0)
        entries = sorted(
            (
                (float(array[entry]), entry, kind)
                for kind, array in self.logits.items()
                for entry in map(tuple, np.argwhere(np.isfinite(array)).tolist())
                if entry[0] > 0
            ),
            key=lambda each: each[:2],
        )
        total = sum(each.sum() for each in weights.values())
        shares = np.cumsum([0.0, *(weights[kind][entry] for _, entry, kind in entries)]) / total
        found = []
        for target in targets:
            if not 0 <= target <= shares[-1] + 1e-9:
                raise ArgumentError(
                    f"targets must be shares from 0 to {shares[-1]:.4f}, as the first step always computes; "
                    f"got {target!r}"
                )
            count = int(np.abs(shares - target).argmin())
            bits = {kind: np.ones(array.shape, dtype=bool) for kind, array in self.logits.items()}
            for _, entry, kind in entries[:count]:
                bits[kind][entry] = False
            found.append(self._schedule(bits, {"target": float(target)}))
        return found

    def _schedule(self, bits: Mapping[str, np.ndarray], how: Mapping[str, Any]) -> Schedule:
        origin = {"router": self.sha256, **how, **self.provenance}
        return Schedule.from_bits(bits, self.components, origin, self.order)

    def check(self, spec: ModelSpec) -> None:
        """This refuses a model of another family or with other blocks.

        Raises:
            ScheduleError: Naming what differs.
        """
        if self.family is not None and self.family != spec.family:
            raise ScheduleError(
                f"the router was trained on a {self.family} model, this one is {spec.family}; "
                "dataclasses.replace(router, family=None) runs it all the same"
            )
        self.schedule().check(spec)

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """This writes a router file."""
        from safetensors.numpy import save

        facts = {
            "format": FORMAT,
            "version": VERSIONS[self.order > 0],
            "components": {kind: list(names) for kind, names in self.components.items()},
            "family": self.family,
            "conditions": self.conditions.facts,
            "tau": self.tau,
            "provenance": dict(self.provenance),
            **({"order": self.order} if self.order else {}),
        }
        tensors = {_TENSOR + kind: np.array(array) for kind, array in self.logits.items()}
        # Not `save_file`, whose files nobody but their owner may read.
        Path(path).write_bytes(save(tensors, metadata={"fastdit": dumps(facts, None)}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Router:
        """This reads a router file.

        Raises:
            ScheduleError: The file cannot be read, or is not a valid router; names the file and what is wrong.
        """
        from safetensors import SafetensorError, safe_open

        try:
            files.check_regular(path, MAX_FILE_BYTES)
            with safe_open(os.fspath(path), framework="numpy") as file:
                facts = files.parse((file.metadata() or {}).get("fastdit", "null"))
                names = list(file.keys())
                if wrong := [n for n in names if file.get_slice(n).get_dtype() != "F32"]:
                    raise ScheduleError(f"tensors must be float32, {wrong} are not")
                tensors = {name: file.get_tensor(name) for name in names}
            return cls._from_file(facts, tensors)
        except (SafetensorError, OSError, ValueError) as error:  # the last from the content, too
            raise ScheduleError(f"{path}: not a router file: {error}") from error

    @classmethod
    def _from_file(cls, facts: Any, tensors: Mapping[str, np.ndarray]) -> Router:
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ScheduleError(f"its metadata does not say format {FORMAT!r}")
        if facts.get("version") not in VERSIONS:
            raise ScheduleError(
                f"version must be {' or '.join(map(str, VERSIONS))}, got {facts.get('version')!r}; "
                "a newer fastdit may read it"
            )
        expect(facts, "metadata", _FACTS | ({"order": int} if facts["version"] == 2 else {}))
        conditions = {"true_guidance": None, "noise": None} | facts["conditions"]
        expect(conditions, "conditions", _CONDITIONS)
        timesteps = conditions["timesteps"]
        if timesteps is not None:
            if not all(type(time) in (int, float) for time in timesteps):
                raise ScheduleError("conditions.timesteps must be numbers")
            timesteps = tuple(map(float, timesteps))
        return cls(
            {name.removeprefix(_TENSOR): tensor for name, tensor in tensors.items()},
            facts["components"],
            facts["family"],
            Conditions(**{**conditions, "timesteps": timesteps}),
            facts["tau"],
            facts["provenance"],
            facts.get("order", 0),
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        components: Sequence[str] = ("attn1", "ff"),
        *,
        alternate: bool = False,
        family: str | None = "dit",
        conditions: Conditions | None = None,
    ) -> Router:
        """This imports a checkpoint of HarmoniCa's or Learning-to-Cache's own training without executing anything.

        Args:
            path: A torch file with entries ``"<i>.prob"`` [N], i = T - 1 the first executed step, at the top or under
                ``"routers"``.
            components: Names of a block's layers in their order; N is a multiple of their number.
            alternate: Learning-to-Cache's rule: steps of odd i compute everything, whatever their entries say.
            family, conditions: What the checkpoint was trained for; it does not say.

        Raises:
            ScheduleError: The file cannot be read safely, or holds something else.
        """
        components = check_names(DEFAULT_KIND, components)
        rows = _checkpoint_rows(path)
        blocks, rest = divmod(rows.shape[1], len(components))
        if rest:
            raise ScheduleError(
                f"{path}: rows of {rows.shape[1]} entries are not a multiple of the {len(components)} "
                f"components {list(components)}"
            )
        if alternate:
            rows[1::2] = LIMIT
        rows = rows[::-1].copy()
        rows[0] = LIMIT
        logits = rows.reshape(len(rows), blocks, len(components))
        return cls(
            {DEFAULT_KIND: logits},
            {DEFAULT_KIND: components},
            family,
            conditions or Conditions(),
            provenance={"imported": Path(path).name},
        )


def check_tau(tau: Any) -> float:
    """A threshold passes as a float; ArgumentError says that it is no number in [0, 1)."""
    return real("tau", tau, "in [0, 1)", lambda x: 0 <= x < 1)


def _checkpoint_rows(path: str | os.PathLike[str]) -> np.ndarray:
    """Torch's reader of plain tensors gives the entries [T, N] by ascending i."""
    import argparse
    import zipfile

    import torch

    try:
        files.check_regular(path, MAX_FILE_BYTES)
        if zipfile.is_zipfile(path):  # what it holds may be compressed to a thousandth of its size
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > MAX_FILE_BYTES:
                    raise ScheduleError(f"it unpacks to more than {MAX_FILE_BYTES} bytes")
        # Both projects store their command line beside the tensors, a class without behaviour.
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        found = found.get("routers", found)
        names = [f"{i}.prob" for i in range(len(found))]
        if not names or set(found) != set(names):
            raise ScheduleError(f"entries must be '0.prob' to '{len(found) - 1}.prob'")
        rows = [found[name].detach() for name in names]
        # A view of one stored number may have any size.
        if any(row.ndim != 1 for row in rows) or sum(map(len, rows)) > MAX_BITS:
            raise ScheduleError(
                f"entries must be vectors of together at most {MAX_BITS} numbers, got shapes "
                f"{sorted({tuple(row.shape) for row in rows})}"
            )
        return np.stack([row.to(torch.float32).numpy() for row in rows])
    # What torch raises of a file that is none depends on its first bytes.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ScheduleError(f"{path}: not a router checkpoint: {reason}") from error
