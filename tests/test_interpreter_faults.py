"""The checks of ``fault_cases.py`` on the kernels in the interpreter, with outputs allocated in memory full of NaN."""

from __future__ import annotations

import types

import pytest
from fault_cases import CHECKS

from gdn_kernels import launch
from gdn_kernels.kernels import decode, recurrent

pytestmark = pytest.mark.interpreter

KERNELS = types.SimpleNamespace(
    packed_decode=decode.packed_decode,
    recurrent_gated_delta_rule_paged=recurrent.recurrent_gated_delta_rule_paged,
    recurrent_gated_delta_rule_verify=recurrent.recurrent_gated_delta_rule_verify,
)


@pytest.mark.parametrize("name", CHECKS)
def test_serving_does_no_harm(name, monkeypatch):
    plain = launch.empty

    def full_of_nan(*args, zero=False, **options):
        made = plain(*args, zero=zero, **options)
        return made if zero else made.fill_(float("nan"))

    monkeypatch.setattr(launch, "empty", full_of_nan)
    CHECKS[name](KERNELS, "cpu")
