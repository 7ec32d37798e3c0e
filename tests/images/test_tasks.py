"""Inputs and measures of networks, task by task."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgedyn.images.image_set import open_set
from edgedyn.images.tasks import TASKS, make_guide, predict_classes, predict_keypoints, shrink
from edgedyn.validation.runs import enlarge

SET = Path(__file__).parents[2] / "calib/skimage-clean-validation.yaml"


def test_small_image_is_the_means_of_squares():
    image = np.arange(24, dtype=np.float32).reshape(1, 1, 4, 6)
    assert shrink(image, 2).tolist() == [[[[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]]]
    assert shrink(image, 1) is image


def test_upscaling_is_given_means_of_the_truth_and_a_grey_guide():
    shapes = [(1, 3, 16, 24), (1, 3, 32, 48)]
    sample = next(open_set(SET).draw(shapes, TASKS["upscale"]))
    assert [x.shape for x in sample.inputs] == shapes
    assert sample.truth.shape == (1, 3, 32, 48)
    np.testing.assert_allclose(sample.noisy, shrink(sample.truth, 2), atol=0)
    guide = sample.inputs[1]
    assert np.array_equal(guide[:, 0], guide[:, 2])
    np.testing.assert_allclose(guide[:, 0], sample.truth.mean(axis=1), rtol=1e-6)
    assert enlarge(sample).shape == sample.truth.shape


def test_guide_has_as_many_channels_as_the_program_takes():
    truth = np.random.default_rng(0).random((1, 3, 4, 6), dtype=np.float32)
    assert make_guide(truth, 1).shape == (1, 1, 4, 6)


def test_answers_are_the_class_and_the_place_of_each_keypoint():
    assert predict_classes(np.array([[0.1, 0.9, 0.3]])).tolist() == [1]
    maps = np.zeros((1, 2, 3, 4))
    maps[0, 0, 2, 1], maps[0, 1, 0, 3] = 1, 2
    assert predict_keypoints(maps).tolist() == [[9, 3]]


@pytest.mark.parametrize("task", ["classify", "keypoints"])
def test_tasks_without_truth_have_answers(task):
    assert not TASKS[task].has_truth
    assert TASKS[task].predictions is not None
