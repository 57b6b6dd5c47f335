"""What type checkers see of names that are made or passed on in a loop. mypy checks this file; nothing runs it."""

from onepass import AutoClip, ClippingPolicy, SkipSpikes, ZClip, lr_scheduler, swa_utils
from onepass.training.averaged_model import AveragedModel
from typing_extensions import assert_type

assert_type(swa_utils.SWALR, type[lr_scheduler.SWALR])
assert_type(swa_utils.AveragedModel, type[AveragedModel])

policies: list[ClippingPolicy] = [ZClip(mode="max"), AutoClip(), SkipSpikes()]
assert_type(policies[0].coefficient(1.0), float)
