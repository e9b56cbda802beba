"""The simulation of scaling: what it takes from rows, and how its curves must run."""

from __future__ import annotations

import json
import math

import numpy
import pytest

from bench import scaling
from bench.scaling import NETWORKS, Job, Network, efficiency, traffic_seconds

JOB = Job(0.05, 0.03, 8e9)


def test_one_worker_loses_nothing_and_more_wait_longer():
    free = Network(0.0, math.inf)
    medians = [float(numpy.median(efficiency(JOB, free, n))) for n in scaling.WORKERS]
    assert medians[0] == pytest.approx(1, abs=0.01)
    assert all(a > b for a, b in zip(medians, medians[1:], strict=False))
    assert numpy.all(efficiency(Job(0.05, 0.0, 0), free, 1000) == 1)


def test_what_travels_is_what_ranks_send():
    """`tests/test_ranks.py` counts the same bytes in real processes."""
    assert scaling.message_bytes(2, 2) == 32
    ethernet = NETWORKS["10 Gb Ethernet"]
    assert traffic_seconds(JOB, ethernet, 1) == 0
    assert traffic_seconds(JOB, ethernet, 1000) == pytest.approx(10 * 50e-6 + 999 * 16 / 1.25e9)
    assert traffic_seconds(JOB, ethernet, 1000, first_order=True) == pytest.approx(20 * 50e-6 + 1.998 * 16e9 / 1.25e9)


def test_rows_become_jobs_and_points(tmp_path):
    step = {"provider": "zo_finetuner", "metric": "time_s", "task": "sst2", "case": "step", "date": "1"}
    measured = step | {"p20": 0.07, "p50": 0.08, "p80": 0.09}
    (tmp_path / "step.jsonl").write_text(json.dumps(measured) + "\n" + json.dumps(step | {"task": "boolq"}) + "\n")
    (job,) = scaling.jobs(tmp_path).values()
    assert job.seconds == 0.08 and job.spread == pytest.approx(math.log(9 / 7) / 1.6832)
    scaling.draw({"a model": job}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
