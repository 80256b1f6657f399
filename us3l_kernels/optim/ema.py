"""Exponential moving average of a student's parameters: the momentum encoder, or teacher."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from us3l_kernels.optim import kernels


class EMA:
    """Momentum encoder: teacher = momentum * teacher + (1 - momentum) * student, in place (MoCo, eq. 2).

    Only parameters are averaged. `update()` does it at once; `optimizer.step(ema=...)` does it together with
    the update of the student, in the same pass over memory where a kernel for it runs. A step that a
    `torch.amp.GradScaler` skips averages nothing.

    Args:
        teacher_params: the averages, e.g. `teacher.parameters()`.
        student_params: what is averaged, in the same order; shapes, dtypes and devices as the teacher's.
        momentum: weight of the old average, in [0, 1]; the attribute may be changed between updates.

    Raises:
        ValueError: the two lists do not match one to one, share memory, or `momentum` is out of range.
    """

    def __init__(
        self, teacher_params: Iterable[Tensor], student_params: Iterable[Tensor], momentum: float
    ) -> None:
        teachers, students = list(teacher_params), list(student_params)
        if len(teachers) != len(students):
            raise ValueError(
                "teacher_params and student_params must match one to one, "
                f"got {len(teachers)} and {len(students)} parameters"
            )
        for index, (teacher, student) in enumerate(zip(teachers, students, strict=True)):
            theirs, its = [(tuple(t.shape), t.dtype, str(t.device)) for t in (teacher, student)]
            if theirs != its:
                raise ValueError(
                    "teacher_params and student_params must agree in shape, dtype and device, "
                    f"got {theirs} and {its} at index {index}"
                )
            if teacher.data_ptr() == student.data_ptr() and teacher.numel() > 0:
                raise ValueError(f"teacher_params must be copies; number {index} shares the student's memory")
        self.teacher_of: dict[Tensor, Tensor] = dict(zip(students, teachers, strict=True))
        self.momentum = momentum
        self.check()

    def check(self) -> None:
        """Raise ValueError unless `momentum` lies in [0, 1]."""
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {self.momentum!r}")

    @torch.no_grad()
    def update(self, *, done: AbstractSet[Tensor] = frozenset()) -> None:
        """Average every student into its teacher, except those in `done` (averaged by a step)."""
        self.check()
        pairs = [(teacher, student) for student, teacher in self.teacher_of.items() if student not in done]
        if not pairs:
            return
        teachers, students = map(list, zip(*pairs, strict=True))
        # Either way one pass without a temporary, and a teacher equal to its student stays exactly that.
        if kernels.takes("ema_", teachers, students):
            kernels.ema_(teachers, students, self.momentum)
        else:
            torch._foreach_lerp_(teachers, students, 1.0 - self.momentum)
