"""Teacher and student: sizes by hand, stems, heads that are kept, and what is refused."""

from __future__ import annotations

import pytest
import torch

from mpkd.model.networks import build_net
from mpkd.model.student import SimpleCNN, check_small_enough
from mpkd.model.teacher import check_teaches
from shared_core.for_torch.cost import count_params


def test_parameters_of_the_student_by_hand():
    widths, before, wanted = (8, 16, 32), 3, 0
    for width in widths:
        wanted += before * width * 9 + 2 * width
        before = width
    wanted += 32 * 10 + 10
    assert count_params(SimpleCNN(10, widths=widths)) == wanted


@pytest.mark.parametrize("size", [8, 32, 33, 224])
def test_the_student_takes_any_size(size):
    net = SimpleCNN(7).eval()
    assert net(torch.zeros(2, 3, size, size)).shape == (2, 7)


def named(name: str, *, classes: int = 10, size: int = 32, stem: str = "auto", **options):
    about = {"name": name, "image_size": size, "stem": stem, "options": options}
    return build_net(about, num_classes=classes)


def test_the_default_student_is_a_tenth_of_a_teacher_at_most():
    teacher = named("resnet18", classes=1000, size=224)
    assert count_params(teacher) == 11_689_512  # torchvision's own figure
    check_small_enough(named("simple_cnn", classes=1000, widths=[32, 64, 128]), teacher)
    check_small_enough(named("simple_cnn", widths=[32, 64, 128]), named("lite0"))
    with pytest.raises(ValueError, match="of the teacher's"):
        check_small_enough(named("simple_cnn", classes=1000, widths=[512, 512]), teacher)


def test_small_images_get_the_small_stem():
    small, standard = named("resnet18").eval(), named("resnet18", stem="standard").eval()
    seen = {}
    for name, net in (("small", small), ("standard", standard)):
        net.layer4.register_forward_hook(
            lambda _m, _i, out, name=name: seen.__setitem__(name, tuple(out.shape[2:]))
        )
        net(torch.zeros(1, 3, 32, 32))
    assert seen == {"small": (4, 4), "standard": (1, 1)}
    # Another net that has layers of these names keeps its own stem.
    named("shufflenet_v2_x0_5")
    with pytest.raises(ValueError, match="no ResNet stem"):
        named("mobilenet_v2", stem="small")


@pytest.mark.parametrize("name", ["lite0", "torchvision/squeezenet1_1", "mobilenet_v2"])
def test_any_network_by_its_name(name):
    net = named(name, classes=5, size=64).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_names_near_the_given_one_are_told():
    with pytest.raises(ValueError, match="'resnet_18'.*resnet18"):
        named("resnet_18")


def test_a_teacher_that_guesses_is_refused():
    check_teaches(0.3, [0.25, 0.25, 0.25, 0.25])
    with pytest.raises(ValueError, match="0.2500"):
        check_teaches(0.25, [0.25, 0.25, 0.25, 0.25])
    with pytest.raises(ValueError, match="0.6000"):
        check_teaches(0.55, [0.6, 0.4])
