"""What a method may know of a model: its block kinds and their components, as plain data.

An adapter fills a :class:`ModelSpec` from a transformer; schedules, plans and methods read it. Nothing here knows a
model family, a tensor or a kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class BlockKind:
    """One list of equal blocks of a transformer.

    Attributes:
        name: The attribute of the transformer that holds the list, e.g. ``"single_transformer_blocks"``.
        count: Number of blocks.
        components: The parts whose outputs can be reused, in the order in which they run.
        absent: (block, component) pairs this very model does not have, e.g. the last SD3 block's ``ff_context``.
        consumers: component -> the only component that reads its output. A component that is not listed adds its
            output to the residual stream itself.
        groups: name -> components that a schedule may set together under that name.
        shared_gates: component -> which vector that all blocks share its gate contains, from 1, 0 for none, in kinds
            whose gates differ between blocks by constants; else empty.
        common_gates: Whether the gates of a component are the same in all blocks.
    """

    name: str
    count: int
    components: tuple[str, ...]
    absent: frozenset[tuple[int, str]] = frozenset()
    consumers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))
    shared_gates: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    common_gates: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """The block kinds of one transformer, in the order in which they run."""

    family: str
    kinds: tuple[BlockKind, ...]

    @property
    def shared_gates(self) -> Mapping[str, int]:
        """Component -> which shared vector its gate contains, if that is so in all kinds; else empty."""
        if not all(kind.shared_gates for kind in self.kinds):
            return {}
        return {name: group for kind in self.kinds for name, group in kind.shared_gates.items()}

    @property
    def common_gates(self) -> bool:
        """Whether the gates of a component are the same in all blocks of its kind, for all kinds."""
        return all(kind.common_gates for kind in self.kinds)

    @property
    def block_count(self) -> int:
        """Number of blocks of all kinds."""
        return sum(kind.count for kind in self.kinds)

    @property
    def component_count(self) -> int:
        """Number of components of all blocks."""
        return sum(1 for _ in self.components())

    def components(self) -> Iterator[tuple[BlockKind, int, str]]:
        """Every (kind, block, component) the model really has, in running order."""
        for kind in self.kinds:
            for block in range(kind.count):
                for component in kind.components:
                    if (block, component) not in kind.absent:
                        yield kind, block, component
