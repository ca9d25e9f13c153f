"""Pictures with a teacher's answers: each asked once, whatever is killed, and never taken for another's."""

import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

from stillroom.codecs import Codec, fingerprint, fit_klt
from stillroom.data import Batch, Loader, Pairs, Tensors, open_source, sample, write_pairs
from stillroom.data.pairs import CHUNK, SHARDS, crops
from stillroom.recipes.encoder import EncoderDistillation
from stillroom.settings import Images, Refusal
from stillroom.train import Product, Silent, load, start
from stillroom.train.product import save_product


def leaves(count):
    """[N, 3, 32, 32]"""
    return sample(open_source(Images(data="leaves", size=32)), count, 0).x


def save(x, path):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(path)


class Counted:
    """Numbers its pictures as item + epoch / 8 in every pixel, so that an answer tells which crop was asked."""

    name, shape, classes = "counted", (1, 2, 2), None

    def __init__(self, count=10, name="counted"):
        self.count, self.name = count, name

    def __len__(self):
        return self.count

    def fetch(self, indices, key):
        return Batch((torch.tensor(indices).float() + key / 8).view(-1, 1, 1, 1).expand(-1, *self.shape).clone())


class Teacher:
    """Answers twice the number, remembers what it was asked, and dies at the `dies`-th crop."""

    def __init__(self, dies=None):
        self.asked, self.dies = [], dies

    def __call__(self, x):
        self.asked += x[:, 0, 0, 0].tolist()
        if self.dies is not None and len(self.asked) > self.dies:
            raise KeyboardInterrupt
        return 2 * x[..., :1, :1]


def test_crop_i_is_item_i_of_its_epoch():
    x = crops(Counted(10), [3, 13, 29, 0, 13])
    assert x[:, 0, 0, 0].tolist() == [3, 3 + 1 / 8, 9 + 2 / 8, 0, 3 + 1 / 8]


def test_pairs_belong_together_in_any_order_and_at_every_step(tmp_path):
    pairs = write_pairs(tmp_path, Counted(10), 33, Teacher(), "t", "as is")
    assert len(pairs) == 33 and pairs.shape == (1, 2, 2)
    with Loader(pairs, seed=5, batch=8) as loader:
        seen = []
        for step in range(9):
            x, y = loader.at(step)[0]
            assert torch.equal(y, 2 * x[..., :1, :1])       # answers, not normalised: they are the teacher's own
            seen += x[:, 0, 0, 0].tolist()
    assert sorted(seen[:33]) == sorted(i % 10 + i // 10 / 8 for i in range(33))      # an epoch shows every pair once


def test_augmented_crops_are_the_same_again(tmp_path):
    """Fetched one by one, together, and under any key: the answers were given to these pictures alone."""
    for i, one in enumerate(leaves(13)):
        save(one, tmp_path / f"photos/{i:02}.png")
    source = open_source(Images(data=str(tmp_path / "photos"), size=16, crop="shrink", shrink=(1.0, 2.0), flip=True))
    pairs = write_pairs(tmp_path / "cache", source, 40, lambda x: x[..., ::8, ::8], "t", "shrink 16")
    together, rows = pairs.fetch(range(40), 7), [pairs.fetch([i], i + 100) for i in range(40)]
    assert torch.equal(together.x, torch.cat([r.x for r in rows]))
    assert torch.equal(together.y, together.x[..., ::8, ::8])
    assert len(source) == 13 and not torch.equal(together.x[0], together.x[13])     # the same picture, cropped anew


def test_killed_it_goes_on_and_asks_nothing_twice(tmp_path):
    count = 3 * CHUNK * SHARDS // 2
    shard = max(CHUNK, count // SHARDS)
    killed = Teacher(dies=1 + 5 * shard + 3)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(tmp_path, Counted(), count, killed, "t", "as is")
    kept = len(list(tmp_path.glob("latents-*"))) * shard
    assert 4 * shard <= kept <= 5 * shard                   # no more is lost than a shard holds
    rest, told = Teacher(), []
    pairs = write_pairs(tmp_path, Counted(), count, rest, "t", "as is", told.append)
    assert len(rest.asked) == 1 + count - kept              # one more, to learn how many channels it answers
    assert f"answered {kept} of {count}" in told[0]
    again = Teacher()
    write_pairs(tmp_path, Counted(), count, again, "t", "as is")
    assert len(again.asked) == 1
    whole = pairs.fetch(range(count), 0)
    assert torch.equal(whole.y, 2 * whole.x[..., :1, :1])


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize(("change", "word"), [
    ({"name": "another"}, "codec"), ({"crop": "shrink 2"}, "crop"), ({"count": 65}, "origin"),
    ({"source": Counted(11)}, "origin"), ({"source": Counted(10, "elsewhere")}, "origin"),
])
def test_what_is_not_the_same_is_refused(tmp_path, change, word, interrupted):
    how = {"source": Counted(10), "count": 64, "name": "t", "crop": "as is"}
    teacher = Teacher(dies=40 if interrupted else None)
    try:
        write_pairs(tmp_path, how["source"], how["count"], teacher, how["name"], how["crop"])
    except KeyboardInterrupt:
        assert interrupted
    new, asked = how | change, Teacher()
    with pytest.raises(Refusal, match=f"another {word}") as told:
        write_pairs(tmp_path, new["source"], new["count"], asked, new["name"], new["crop"])
    assert "\n" not in str(told.value) and "write to a new folder" in str(told.value)
    assert len(asked.asked) == 1


def test_other_pictures_of_one_name_are_told_apart(tmp_path):
    """The same name, count and first pictures; a later one was exchanged."""
    x = torch.linspace(-1, 1, 64 * 12).view(64, 3, 2, 2)
    write_pairs(tmp_path, Tensors(x, name="mine"), 64, Teacher(), "t", "as is")
    x = x.clone()
    x[32:] *= -1
    with pytest.raises(Refusal, match="another origin"):
        write_pairs(tmp_path, Tensors(x, name="mine"), 64, Teacher(), "t", "as is")


def test_a_stream_is_refused(tmp_path):
    class Tape(Counted):
        def iterate(self, cursor, seed): ...
        def decode(self, items, which, key): ...

    with pytest.raises(Refusal, match=r"counted: a stream has no numbered crops.*use a folder or parquet"):
        write_pairs(tmp_path / "cache", Tape(), 8, Teacher(), "t", "as is")
    assert not (tmp_path / "cache").exists()


def test_what_lies_in_a_folder_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(Refusal, match=r"holds other things than latents \(config.json\); write to a new folder"):
        write_pairs(tmp_path, Counted(), 8, Teacher(), "t", "as is")
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_calibrated_scale_leaves_a_codecs_name():
    codec = fit_klt(leaves(12), 8, 4)
    name = fingerprint(codec)
    assert fingerprint(Codec(codec.encoder, codec.decoder, codec.space, 1.5)) == name
    codec.encoder.mean[0, 0, 0] += 1e-3
    assert fingerprint(codec) != name


def test_a_sample_lies_on_the_cpu_wherever_a_recipe_is_built(tmp_path):
    save(leaves(1)[0], tmp_path / "photos/0.png")
    source = open_source(Images(data=str(tmp_path / "photos"), size=16, crop="random"))
    with torch.device("meta"):
        x = sample(source, 4, 0).x
    assert x.device.type == "cpu" and torch.equal(x, sample(source, 4, 0).x)


def test_a_codecs_answers_are_those_that_it_gives_itself(tmp_path):
    source = Tensors(leaves(12))
    codec = fit_klt(source.x, 8, 4)
    pairs = write_pairs(tmp_path, source, 20, codec.answer, fingerprint(codec), "as is")
    x, y = pairs.fetch([19, 4], 0)
    assert isinstance(pairs, Pairs) and torch.allclose(codec.space.normalise(y), codec.encode(x), atol=1e-5)


PROCESS = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout
from stillroom.recipes import encoder
from stillroom.train import Silent, start
from stillroom.train.world import World

rank, out, real, patient = int(os.environ["RANK"]), Path(sys.argv[1]), encoder.answering, World.patience
dist.init_process_group("gloo", f"file://{out.parent}.meeting", rank=rank, world_size=2)
def patience(world):
    _set_pg_timeout(timedelta(seconds=3))           # less than what is prepared takes
    return patient(world)
World.patience = patience
class Prepares(encoder.EncoderDistillation):
    @classmethod
    def prepare(cls, *given):
        _set_pg_timeout(timedelta(minutes=5))       # rank 1 has waited: a busy machine may be slow from here on
        return super().prepare(*given)
def answering(codec):
    def answer(x):
        print(len(x), flush=True)
        if rank == 0 and len(x) == 16:
            time.sleep(3)
        return real(codec)(x)
    return answer
encoder.answering = answering
settings = encoder.Settings(out=out, teacher=sys.argv[2], data="leaves", size=32, steps=4, params=9000, batch=8,
                            precision="float32", log_every=1, cache=out.parent / "cache", cache_crops=32)
start(Prepares, settings, "encoder", watch=Silent())
dist.destroy_process_group()
"""


def test_of_two_processes_one_prepares_and_both_learn_what_one_would(tmp_path):
    klt = str(tmp_path / "klt")
    save_product(Product("codec", {"codec": fit_klt(leaves(32), 8, 8)}), tmp_path / "klt")
    how = EncoderDistillation.Settings(out=tmp_path / "one/run", teacher=klt, data="leaves", size=32, steps=4, batch=8,
                                       params=9000, precision="float32", cache=tmp_path / "one/cache", cache_crops=32)
    alone = start(EncoderDistillation, how, "encoder", watch=Silent())
    where = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    words = [sys.executable, "-c", PROCESS, str(tmp_path / "two/run"), klt]
    both = [subprocess.Popen(words, env=where | {"RANK": rank}, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE) for rank in "01"]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    asked = [sum(map(int, out.split())) for out, _ in told]
    assert asked[0] >= 32 and asked[1] < 8
    mine, theirs = load(alone).state_dict(), load(tmp_path / "two/run").state_dict()
    assert all(torch.allclose(mine[k], theirs[k], atol=1e-6) for k in mine)
