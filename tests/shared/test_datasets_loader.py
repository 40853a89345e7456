"""The loader: the same batches for any threads, nothing lost, resumable, stoppable; its parts."""

import gc
import threading
import time

import cv2
import numpy as np
import pytest

from shared_core.datasets.errors import DatasetError, DecodeError
from shared_core.datasets.reading.buffers import BufferPool
from shared_core.datasets.reading.decode import EncodedImage, decode
from shared_core.datasets.reading.image_set import ImageSet
from shared_core.datasets.reading.loader import BatchLoader, usable_cores, write_view
from shared_core.datasets.reading.order import EpochOrder
from shared_core.datasets.views.augment import EvalView, SmallView, TrainView, ViewRandom, view_rng
from shared_core.datasets.views.geometry import resize


def write_images(folder, number, sizes=((40, 50), (64, 33), (200, 210))):
    """JPEG and PNG files whose mean grey tells them apart."""
    paths = []
    for n in range(number):
        height, width = sizes[n % len(sizes)]
        rng = np.random.default_rng(n)
        image = rng.normal(20 + 10 * n, 6, (height // 4, width // 4, 3)).clip(0, 255)
        image = cv2.resize(image.astype(np.uint8), (width, height))
        path = folder / f"{n:02d}.{'png' if n % 5 == 4 else 'jpg'}"
        cv2.imwrite(str(path), image)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    paths = write_images(tmp_path_factory.mktemp("images"), 20)
    return ImageSet(paths, np.arange(20) % 4, [f"key{n}" for n in range(20)])


def loader(files, *, threads=2, shuffle=True, view=None, batch_size=6, **options):
    order = options.pop("order", None) or EpochOrder(len(files), seed=5, shuffle=shuffle)
    view = view or TrainView(16, seed=1, randaugment="rand-m9-mstd0.5-inc1", erasing=0.3)
    return BatchLoader(
        files, view=view, batch_size=batch_size, order=order, threads=threads, **options
    )


def collect(batches):
    return [(b.images.copy(), b.labels, b.indices, b.view_id) for b in batches]


def same(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_array_equal(a, b)


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("image-loader")]


def test_batches_are_the_views_in_order(files):
    load = loader(files)
    assert len(load) == 4
    for epoch in range(2):
        order = load.order.indices()
        got = collect(load)
        np.testing.assert_array_equal(np.concatenate([g[2] for g in got]), order)
        np.testing.assert_array_equal(np.sort(order), np.arange(20))
        assert [len(g[1]) for g in got] == [6, 6, 6, 2] and {g[3] for g in got} == {epoch}
        for images, labels, indices, view_id in got:
            np.testing.assert_array_equal(labels, indices % 4)
            for image, index in zip(images, indices, strict=True):
                want = np.empty((16, 16, 3), np.uint8)
                rng = view_rng(1, f"key{index}", view_id)
                write_view(files.open(int(index)), load.view, rng, want)
                np.testing.assert_array_equal(image, want)
    assert load.order.epoch == 2 and load.order.position == 0


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(files, threads):
    same(collect(loader(files, threads=threads)), collect(loader(files, threads=0)))


def test_a_view_does_not_depend_on_batch_order_or_neighbours(files):
    by_index = {}
    for images, _labels, indices, _view in collect(loader(files, batch_size=7)):
        by_index.update(zip(indices.tolist(), images, strict=True))
    chosen = [11, 3, 19]
    part = collect(loader(files.subset(chosen), shuffle=False, batch_size=2))
    got = np.concatenate([p[0] for p in part])
    for n, index in enumerate(chosen):
        np.testing.assert_array_equal(got[n], by_index[index])


def test_views_change_with_the_epoch_and_come_back(files):
    load = loader(files, shuffle=False, view_of_epoch=lambda epoch: epoch % 2)
    epochs = [collect(load) for _ in range(3)]
    same(epochs[0], epochs[2])
    assert not np.array_equal(epochs[0][0][0], epochs[1][0][0])


def test_without_reduced_decoding_files_and_pixels_give_the_same(files):
    """The header says the size before the pixels are there: the plan must be the same."""
    view = TrainView(16, seed=3, dct_scaled=False)
    got = np.concatenate([b[0] for b in collect(loader(files, view=view, shuffle=False))])
    for n in range(20):
        want = view(decode(files.name(n)), view_rng(3, f"key{n}", 0))
        np.testing.assert_array_equal(got[n], want)


def test_reduced_decoding_is_used_only_where_the_crop_stays_large_enough(tmp_path):
    ramp = np.linspace(0, 255, 640)[None, :, None] * np.ones((480, 1, 3))
    path = tmp_path / "ramp.jpg"
    cv2.imwrite(str(path), ramp.astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 98])
    seen = []

    class Spy(EncodedImage):
        def pixels(self, *, factor=1, rows=None):
            seen.append((factor, rows))
            return super().pixels(factor=factor, rows=rows)

    view, factors = TrainView(100, seed=0), set()
    for n in range(60):
        image = Spy(path.read_bytes(), name="ramp")
        out = np.empty((100, 100, 3), np.uint8)
        write_view(image, view, view_rng(0, n, 0), out)
        box = view.plan(view_rng(0, n, 0), 480, 640).box
        factor, rows = seen[-1]
        factors.add(factor)
        assert min(box[2:]) // factor >= 100 or factor == 1
        assert factor == 4 or min(box[2:]) // (factor * 2) < 100
        assert rows == box[0] // factor + box[2] // factor
        whole = TrainView(100, seed=0, dct_scaled=False)
        want = whole(decode(path), view_rng(0, n, 0)).astype(int)
        # The reduced crop may be off by a pixel of the reduced image: less than 2 * 4 levels.
        assert np.abs(out - want).max() <= 2 * factor + 2
    assert factors == {1, 2, 4}


def test_eval_view_from_files(files):
    got = np.concatenate([b[0] for b in collect(loader(files, view=EvalView(24), shuffle=False))])
    exact = EvalView(24, dct_scaled=False)
    for n in range(20):
        assert np.abs(got[n].astype(int) - exact(decode(files.name(n)))).mean() < 3


def test_array_source_and_small_views():
    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    data = ImageSet(None, np.arange(50), source=images)
    order = EpochOrder(50, seed=1)
    got = collect(BatchLoader(data, view=SmallView(8, pad=2, seed=4), batch_size=16, order=order))
    for batch, _labels, indices, view_id in got:
        for image, index in zip(batch, indices, strict=True):
            y, x, flip = view_rng(4, int(index), view_id).random(3)
            padded = np.pad(images[index], ((2, 2), (2, 2), (0, 0)))
            want = padded[int(y * 5) :, int(x * 5) :][:8, :8]
            np.testing.assert_array_equal(image, want[:, ::-1] if flip < 0.5 else want)
    plain = next(iter(BatchLoader(data, view=EvalView(8, resize_ratio=None), batch_size=50)))
    np.testing.assert_array_equal(plain.images, images)
    with pytest.raises(ValueError, match="small view"):
        BatchLoader(data, view=SmallView(9), batch_size=4)
    assert data.name(3) == "image 3"
    np.testing.assert_array_equal(data.subset([4, 2]).image(0), images[4])


def test_batches_stay_valid_while_they_are_held(files):
    load = loader(files, batch_size=2, prefetch=3)
    held = list(load)
    same(
        [(b.images, b.labels, b.indices, b.view_id) for b in held],
        collect(loader(files, batch_size=2)),
    )
    memory = {b.images.__array_interface__["data"][0] for b in held}
    assert len(memory) == len(held)


def test_memory_is_used_again_when_nothing_holds_it(files):
    load = loader(files, batch_size=2, prefetch=1)
    memory = set()
    for _epoch in range(3):
        for batch in load:
            memory.add(batch.images.__array_interface__["data"][0])
            time.sleep(0.002)
    assert len(memory) <= 6  # 30 batches


def test_buffer_pool():
    pool = BufferPool()
    first = pool.take((4, 5), np.uint8)
    second = pool.take((4, 5), np.uint8)
    assert first is not second
    address = first.__array_interface__["data"][0]
    view = first[1:3].reshape(-1)
    del first
    assert pool.take((4, 5), np.uint8).__array_interface__["data"][0] != address
    del view
    gc.collect()
    addresses = {pool.take((4, 5), np.uint8).__array_interface__["data"][0] for _ in range(3)}
    assert len(addresses) == 1
    assert pool.take((4, 5), np.float32).dtype == np.float32


def test_resume_in_the_middle_of_an_epoch(files):
    whole = loader(files, batch_size=3)
    everything = [collect(whole) for _ in range(2)]
    for stop in range(1, 8):
        first = loader(files, batch_size=3)
        for n, _batch in enumerate(first, start=1):
            if n == stop:
                state = first.state_dict()
                break
        assert state["position"] == min(3 * stop, 20)
        second = loader(files, batch_size=3)
        second.load_state_dict(state)
        same(collect(second), everything[0][stop:])
        same(collect(second), everything[1])
        same(collect(first), everything[0][stop:])  # leaving the loop keeps the position


def test_leaving_the_loop_stops_the_threads(files):
    before = len(loader_threads())
    for _batch in loader(files, batch_size=2, threads=3):
        assert len(loader_threads()) == before + 3
        break
    gc.collect()
    assert len(loader_threads()) == before
    with pytest.raises(RuntimeError, match="mine"):
        for _batch in loader(files, batch_size=2, threads=3):
            raise RuntimeError("mine")
    gc.collect()
    assert len(loader_threads()) == before
    iterator = iter(loader(files, batch_size=2))
    next(iterator)
    iterator.close()
    assert len(loader_threads()) == before


def broken_set(tmp_path):
    paths = write_images(tmp_path, 11)
    paths[3].write_bytes(paths[3].read_bytes()[:200])
    paths[7] = tmp_path / "gone.jpg"
    paths[8].write_bytes(b"")
    return ImageSet(paths, np.arange(11))


@pytest.mark.parametrize("threads", [0, 2])
def test_bad_files_are_named_after_the_good_batches_before_them(tmp_path, threads):
    load = loader(broken_set(tmp_path), shuffle=False, batch_size=3, threads=threads)
    seen = []
    with pytest.raises(DecodeError, match=r"03\.jpg"):
        for batch in load:
            seen += batch.indices.tolist()
    assert seen == [0, 1, 2] and load.order.position == 3
    gc.collect()
    assert not loader_threads()


@pytest.mark.parametrize("threads", [0, 2])
def test_skipping_loses_only_the_bad_ones(tmp_path, threads):
    data = broken_set(tmp_path)
    load = loader(data, shuffle=False, batch_size=2, threads=threads, on_error="skip")
    got = collect(load)
    assert [g[2].tolist() for g in got] == [[0, 1], [2], [4, 5], [6], [9], [10]]
    assert [s.index for s in load.skipped] == [3, 7, 8]
    assert load.skipped[0].name.endswith("03.jpg") and "truncated" in load.skipped[0].reason
    assert "does not exist" in load.skipped[1].reason and "empty" in load.skipped[2].reason
    good = [0, 1, 2, 4, 5, 6, 9, 10]
    want = collect(loader(data.subset(good), shuffle=False, batch_size=8))[0][0]
    np.testing.assert_array_equal(np.concatenate([g[0] for g in got]), want)
    only_bad = loader(data.subset([7, 8]), batch_size=1, on_error="skip")
    assert collect(only_bad) == [] and only_bad.order.epoch == 1


def test_drop_last(files):
    load = loader(files, batch_size=6, drop_last=True)
    assert len(load) == 3
    assert [len(g[1]) for g in collect(load)] == [6, 6, 6]
    assert load.order.epoch == 1
    state = {**load.state_dict(), "epoch": 0, "position": 18}
    load.load_state_dict(state)
    assert collect(load) == [] and load.order.epoch == 1
    assert len(loader(files, batch_size=30, drop_last=True)) == 0


def test_slow_consumers_do_not_make_it_run_ahead(files):
    opened = []

    class Counting(ImageSet):
        def open(self, index):
            opened.append(index)
            return super().open(index)

    counting = Counting(files.paths, files.labels, files.keys)
    for _batch in loader(counting, batch_size=2, prefetch=2):
        time.sleep(0.2)
        assert len(opened) <= 2 * (1 + 2)
        break


@pytest.mark.parametrize("n", [0, 1, 7, 8, 23])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_every_sample_once(n, world):
    single = EpochOrder(n, seed=3).indices(4)
    orders = [EpochOrder(n, seed=3, rank=r, world_size=world) for r in range(world)]
    shares = [o.indices(4) for o in orders]
    assert [len(s) for s in shares] == [len(o) for o in orders]
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(n))
    for r, share in enumerate(shares):
        np.testing.assert_array_equal(share, single[r::world])
    for uneven, length in (("wrap", -(-n // world)), ("drop", n // world)):
        orders = [
            EpochOrder(n, seed=3, rank=r, world_size=world, uneven=uneven) for r in range(world)
        ]
        shares = [o.indices(4) for o in orders]
        assert {len(s) for s in shares} == {length} == {len(o) for o in orders}
        joined = np.stack(shares, 1).reshape(-1)  # the global batches, sample by sample
        want = single[: length * world] if uneven == "drop" else np.resize(single, length * world)
        np.testing.assert_array_equal(joined, want)


def test_two_ranks_see_the_batches_of_one(files):
    one = collect(loader(files, batch_size=8, drop_last=True))
    ranks = [
        collect(
            loader(
                files,
                batch_size=4,
                order=EpochOrder(20, seed=5, rank=r, world_size=2),
                drop_last=True,
            )
        )
        for r in range(2)
    ]
    for n, (images, _labels, indices, _view) in enumerate(one):
        for r in range(2):
            np.testing.assert_array_equal(ranks[r][n][0], images[r::2])
            np.testing.assert_array_equal(ranks[r][n][2], indices[r::2])


def test_order():
    order = EpochOrder(50, seed=1)
    first, second = order.indices(0), order.indices(1)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, EpochOrder(50, seed=1).indices(0))
    assert not np.array_equal(first, EpochOrder(50, seed=2).indices(0))
    np.testing.assert_array_equal(EpochOrder(5, shuffle=False).indices(9), np.arange(5))
    order.set_epoch(3)
    order.position = 20
    other = EpochOrder(50, seed=1)
    other.load_state_dict(order.state_dict())
    assert (other.epoch, other.position) == (3, 20)
    # every place is as likely for every sample
    places = np.array([EpochOrder(6, seed=s).indices(0) for s in range(600)])
    counts = np.stack([np.bincount(column, minlength=6) for column in places.T])
    assert counts.min() > 60 and counts.max() < 145


def test_a_state_of_other_data_is_refused():
    state = EpochOrder(50, seed=1).state_dict()
    for other in (
        EpochOrder(51, seed=1),
        EpochOrder(50, seed=2),
        EpochOrder(50, seed=1, shuffle=False),
        EpochOrder(50, seed=1, world_size=2),
        EpochOrder(50, seed=1, uneven="wrap"),
    ):
        with pytest.raises(DatasetError, match="saved sample order"):
            other.load_state_dict(state)
    with pytest.raises(DatasetError, match="position 51"):
        EpochOrder(50, seed=1).load_state_dict({**state, "position": 51})
    with pytest.raises(DatasetError, match="None"):
        EpochOrder(50, seed=1).load_state_dict({})


def test_image_set_from_manifest_rows(files, tmp_path):
    paths = write_images(tmp_path / "r" if (tmp_path / "r").mkdir() is None else tmp_path, 3)
    rows = [(f"r/{p.name}", n, f"c{n}") for n, p in enumerate(paths)]
    data = ImageSet.from_rows(rows, root=tmp_path)
    assert len(data) == 3 and data.keys == ["c0", "c1", "c2"] and data.labels.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(data.image(1), decode(paths[1]))


@pytest.mark.parametrize(
    "make",
    [
        lambda f: loader(f, batch_size=0),
        lambda f: loader(f, threads=-1),
        lambda f: loader(f, prefetch=0),
        lambda f: loader(f, on_error="ignore"),
        lambda f: loader(f, order=EpochOrder(19)),
        lambda f: EpochOrder(4, rank=2, world_size=2),
        lambda f: EpochOrder(-1),
        lambda f: EpochOrder(3, uneven="x"),
        lambda f: EpochOrder(3).set_epoch(-1),
        lambda f: ImageSet(f.paths, [1]),
        lambda f: ImageSet(None, [1]),
        lambda f: ImageSet(f.paths, f.labels, ["a"]),
        lambda f: ImageSet(f.paths, f.labels, source="web"),
        lambda f: ImageSet(None, [1], source=np.zeros((1, 4, 4, 3))),
        lambda f: ImageSet(None, [1], source=np.zeros((2, 4, 4, 3), np.uint8)),
    ],
)
def test_refusals(files, make):
    with pytest.raises(ValueError, match="expected|given|order|samples"):
        make(files)


def test_usable_cores():
    assert 1 <= usable_cores() <= 8 and usable_cores(1) == 1


def test_write_view_reads_pixels_without_writing(files):
    image = decode(files.name(2))
    image.flags.writeable = False
    out = np.empty((16, 16, 3), np.uint8)
    write_view(image, EvalView(16, resize_ratio=None), ViewRandom().at(0, 0, 0), out)
    np.testing.assert_array_equal(out, resize(image, (16, 16)))
