"""Teacher and student: sizes by hand, stems, heads that are kept, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet18

from mpkd.model.student import SimpleCNN, build_student, check_small_enough
from mpkd.model.teacher import build_teacher, check_teaches, head_name, load_pretrained
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


def test_the_default_student_is_a_tenth_of_resnet18_at_most():
    teacher = build_teacher("resnet18", num_classes=1000, image_size=224)
    assert count_params(teacher) == 11_689_512  # torchvision's own figure
    student = build_student("simple_cnn", num_classes=1000)
    check_small_enough(student, teacher)
    with pytest.raises(ValueError, match="of the teacher's"):
        check_small_enough(
            build_student("simple_cnn", num_classes=1000, widths=(512, 512)), teacher
        )


def test_small_images_get_the_small_stem():
    small = build_teacher("resnet18", num_classes=10, image_size=32).eval()
    standard = build_teacher("resnet18", num_classes=10, image_size=32, stem="standard").eval()
    seen = {}
    for name, net in (("small", small), ("standard", standard)):
        net.layer4.register_forward_hook(
            lambda _m, _i, out, name=name: seen.__setitem__(name, tuple(out.shape[2:]))
        )
        net(torch.zeros(1, 3, 32, 32))
    assert seen == {"small": (4, 4), "standard": (1, 1)}
    # Another net that has layers of these names keeps its own stem.
    build_teacher("shufflenet_v2_x0_5", num_classes=10, image_size=32)
    with pytest.raises(ValueError, match="no ResNet stem"):
        build_teacher("mobilenet_v2", num_classes=10, image_size=32, stem="small")


def test_the_head_of_the_file_is_kept_when_the_classes_are_the_same(tmp_path):
    source = resnet18(num_classes=10)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    same = build_teacher("resnet18", num_classes=10, image_size=224)
    assert load_pretrained(same, tmp_path / "weights.pth") == []
    assert torch.equal(same.fc.weight, source.fc.weight)
    other = build_teacher("resnet18", num_classes=4, image_size=224)
    assert load_pretrained(other, tmp_path / "weights.pth") == ["fc.weight", "fc.bias"]
    assert torch.equal(other.layer4[1].conv2.weight, source.layer4[1].conv2.weight)
    small = build_teacher("resnet18", num_classes=10, image_size=32)
    with pytest.raises(ValueError, match="conv1"):
        load_pretrained(small, tmp_path / "weights.pth")


def test_names_near_the_given_one_are_told():
    with pytest.raises(ValueError, match="'resnet_18'.*resnet18"):
        build_student("resnet_18", num_classes=10)
    assert head_name(build_student("mobilenet_v2", num_classes=5)) == "classifier.1"


def test_a_teacher_that_guesses_is_refused():
    check_teaches(0.3, [0.25, 0.25, 0.25, 0.25])
    with pytest.raises(ValueError, match="0.2500"):
        check_teaches(0.25, [0.25, 0.25, 0.25, 0.25])
    with pytest.raises(ValueError, match="0.6000"):
        check_teaches(0.55, [0.6, 0.4])
