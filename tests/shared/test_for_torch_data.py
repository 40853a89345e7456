"""From bytes to tensors: normalisation against NumPy float64, layout, memory, the torch loader."""

import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from shared_core.datasets.reading.image_set import ImageSet  # noqa: E402
from shared_core.datasets.reading.loader import BatchLoader  # noqa: E402
from shared_core.datasets.reading.order import EpochOrder  # noqa: E402
from shared_core.datasets.views.augment import SmallView  # noqa: E402
from shared_core.for_torch.data import Normalizer, TorchLoader, to_device  # noqa: E402

MEAN, STD = (0.1, 0.5, 0.9), (0.2, 0.3, 0.05)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def slow(images):
    want = (images / 255.0 - np.array(MEAN)) / np.array(STD)
    return want.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("shape", [(3, 40, 50, 3), (70, 8, 9, 3), (2, 1, 1, 3), (1, 3, 20000, 3)])
def test_normalised_values(shape):
    images = noise(*shape)
    for source in (images, torch.from_numpy(images), torch.from_numpy(images)[:, ::2]):
        got = Normalizer(MEAN, STD)(source)
        want = slow(np.asarray(source))
        assert got.dtype == torch.float32 and got.shape == want.shape
        np.testing.assert_allclose(got.numpy(), want, atol=2e-5)
        assert got.is_contiguous(memory_format=torch.channels_last)


def test_other_types_and_read_only_arrays():
    images = noise(2, 6, 5, 3)
    images.flags.writeable = False
    half = Normalizer(MEAN, STD, dtype=torch.bfloat16)(images)
    assert half.dtype == torch.bfloat16
    np.testing.assert_allclose(half.float().numpy(), slow(images), rtol=0.01, atol=0.01)


def test_empty_batch():
    assert Normalizer(MEAN, STD)(noise(0, 6, 5, 3)).shape == (0, 3, 6, 5)


def test_a_result_is_never_overwritten_while_it_is_held():
    normalizer = Normalizer(MEAN, STD)
    first = normalizer(noise(2, 6, 5, 3))
    copy, view = first.clone(), first[:1, :, 2:]
    normalizer(noise(2, 6, 5, 3) // 2)
    assert torch.equal(first, copy)
    address = first.data_ptr()
    del first
    assert normalizer(noise(2, 6, 5, 3) // 2).data_ptr() != address
    assert torch.equal(view, copy[:1, :, 2:])
    del view
    gc.collect()
    assert len({normalizer(noise(2, 6, 5, 3)).data_ptr() for _ in range(4)}) == 1


def test_memory_saved_for_backward_is_held():
    normalizer = Normalizer(MEAN, STD)
    weight = torch.ones(1, requires_grad=True)
    images = noise(2, 6, 5, 3)
    loss = (normalizer(images) * weight).sum()
    normalizer(images // 3)
    loss.backward()
    assert weight.grad.item() == pytest.approx(float(slow(images).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (np.zeros((2, 3, 4, 4), np.uint8), r"\(2, 3, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4, 3), np.uint8), r"\(4, 4, 3\)"),
    ],
)
def test_bad_batches(images, text):
    with pytest.raises(ValueError, match=text):
        Normalizer()(images)


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (1, 1, 1)), ((0, 0, 0), (1, 0, 1))])
def test_bad_statistics(mean, std):
    with pytest.raises(ValueError, match="expected three"):
        Normalizer(mean, std)


def test_torch_loader_is_the_loader_normalised():
    images = noise(21, 8, 8, 3)
    data = ImageSet(None, np.arange(21) % 5, source=images)

    def plain():
        order = EpochOrder(21, seed=2)
        return BatchLoader(data, view=SmallView(8, seed=1), batch_size=4, order=order, threads=2)

    normalizer = Normalizer(MEAN, STD)
    loader = TorchLoader(plain(), normalizer)
    assert len(loader) == 6
    state, count = None, 0
    for got, want in zip(loader, plain(), strict=True):
        np.testing.assert_allclose(got.images.numpy(), slow(want.images), atol=2e-5)
        np.testing.assert_array_equal(got.labels.numpy(), want.labels)
        np.testing.assert_array_equal(got.indices.numpy(), want.indices)
        assert got.labels.dtype == torch.int64 and got.view_id == want.view_id == 0
        assert torch.equal(to_device(want, normalizer).images, got.images)
        count += 1
        if count == 3:
            state = loader.state_dict()
    again = TorchLoader(plain(), normalizer)
    again.load_state_dict(state)
    assert sum(len(batch.labels) for batch in again) == 21 - 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    images = noise(4, 30, 20, 3)
    got = Normalizer(MEAN, STD, device="cuda")(images)
    assert got.is_cuda and got.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(got.cpu().numpy(), slow(images), atol=2e-5)
