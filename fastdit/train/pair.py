"""Two values that go through the same arithmetic: the student's output with its graph, the teacher's without one.

A pipeline combines a transformer's outputs (guidance, dropped channels) before its scheduler sees them, in code of its
own and without gradients. A :class:`Pair` takes both models' outputs through that code at once, whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Pair(Tensor):
    """A pair is a tensor with the student's values, and beside it what the teacher has in its place.

    Attributes:
        student: The values with their graph.
        teacher: Those of the teacher, of the same shape.
    """

    student: Tensor
    teacher: Tensor

    @staticmethod
    def of(student: Any, teacher: Any) -> Any:
        """This pairs two tensors of one shape, or those of two lists."""
        if isinstance(student, list):
            return [Pair.of(*each) for each in zip(student, teacher, strict=True)]
        pair = student.detach().as_subclass(Pair)
        pair.student, pair.teacher = student, teacher
        return pair

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The function is applied to both; what is no tensor (a shape, a dtype) is the student's."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            with torch.enable_grad():
                student = function(*_side(args, "student"), **_side(kwargs, "student"))
            with torch.no_grad():
                teacher = function(*_side(args, "teacher"), **_side(kwargs, "teacher"))
        return _joined(student, teacher)


def _side(value: Any, name: str) -> Any:
    if isinstance(value, Pair):
        with torch._C.DisableTorchFunctionSubclass():
            return value.__dict__[name]
    if isinstance(value, (tuple, list)):
        return type(value)(_side(item, name) for item in value)
    if isinstance(value, Mapping):
        return {key: _side(item, name) for key, item in value.items()}
    return value


def _joined(student: Any, teacher: Any) -> Any:
    if isinstance(student, Tensor):
        return Pair.of(student, teacher)
    if type(student) in (tuple, list):
        return type(student)(map(_joined, student, teacher))
    return student
