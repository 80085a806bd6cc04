# SPDX-License-Identifier: Apache-2.0
"""Runs under the simulator: compares every case on the CPU and on `npu:0`.

Prints one JSON object per case: its name, and in what the results differ, which is nothing if all
is well.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from tests import kernel_cases, kernel_cases_more
from tests.kernel_inputs import Case, Inputs


def flat(result: Any) -> list[Any]:
    """Returns the tensors and numbers of a result, in order."""
    if isinstance(result, (tuple, list)):
        return [part for element in result for part in flat(element)]
    return [result]


def difference(actual: Any, expected: Any, tolerance: float) -> str | None:
    """Says in what two results differ, if they do."""
    if not isinstance(expected, torch.Tensor):
        return None if actual == expected else f"{actual}, not {expected}"
    actual = actual.cpu()
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return f"{actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}"
    is_exact = not (expected.is_floating_point() or expected.is_complex())
    bound = 0.0 if is_exact else tolerance
    if torch.allclose(actual, expected, rtol=bound, atol=bound, equal_nan=True):
        return None
    return f"{actual.flatten()[:8].tolist()}, not {expected.flatten()[:8].tolist()}"


def check(case: Case) -> list[str]:
    """Returns the differences over all types and layouts."""
    differences = []
    for dtype in case.dtypes:
        for layout in case.layouts:
            where = f"{dtype} {layout}"
            expected = flat(case.function(Inputs("cpu", dtype, layout)))
            try:
                actual = flat(case.function(Inputs("npu:0", dtype, layout)))
                torch.npu.synchronize()
            except RuntimeError as error:
                differences.append(f"{where}: {error}")
                continue
            bound = case.tolerance.get(dtype, 1e-5)
            for one, other in zip(actual, expected, strict=True):
                text = difference(one, other, bound)
                if text is not None:
                    differences.append(f"{where}: {text}")
    return differences


def main(names: list[str]) -> None:
    """Checks the named cases, or all."""
    torch.set_num_threads(1)
    for case in [*kernel_cases.cases(), *kernel_cases_more.cases()]:
        if not names or case.name in names:
            print(json.dumps({"name": case.name, "differences": check(case)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
