"""The engine as a whole, on the embedded sample model: real weights, no network, no GPU."""

from __future__ import annotations

import gc
import io
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from studio_worker import __version__, sample_model
from studio_worker.engine import Inputs, Request, Router
from studio_worker.engine.diffusion import DiffusionEngine
from studio_worker.engine.families import identify
from studio_worker.engine.families.parts import clip_prompts
from studio_worker.engine.families.stable_diffusion import SAMPLE as SAMPLE_FAMILY
from studio_worker.engine.loading import load_part
from studio_worker.engine.memory.machine import MachineMemory
from studio_worker.engine.memory.residency import Key, Residency
from studio_worker.engine.parameters import EngineDefaults, resolve
from studio_worker.engine.rendering.canvas import Starting
from studio_worker.engine.rendering.pipeline import LoadedModel
from studio_worker.engine.sampling.samplers import SAMPLERS
from studio_worker.errors import DeviceError, JobCancelled, JobError
from studio_worker.jobs import Cancel, Picture
from studio_worker.models import CliDefaults, LocalFile, ModelSource
from tests.lab.engine import (
    PROMPT,
    SAMPLE,
    changed_sample,
    decoded,
    encoded,
    request,
    scene,
)
from tests.lab.stock import alike, run, sample_pipeline

torch.set_num_threads(1)

# diffusers meets numpy 2 in thousands of places that are not ours.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

UNET_BIAS = "model.diffusion_model.out.2.bias"
VAE_BIAS = "first_stage_model.decoder.conv_out.bias"
TEXT_BIAS = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2.bias"


@pytest.fixture(scope="module")
def engine() -> DiffusionEngine:
    return DiffusionEngine("cpu")


@pytest.fixture(scope="module")
def stock() -> StableDiffusionPipeline:
    """diffusers' own pipeline from the same weights, without anything of ours."""
    return sample_pipeline()


def ignore(_done: int, _total: int) -> None:
    """A progress callback for tests of something else."""


def make(engine: DiffusionEngine, asked: Request | None = None, **task: Any) -> Picture:
    return engine.generate(asked or request(**task), ignore, Cancel())


def pixels(picture: Picture | Image.Image) -> np.ndarray:
    image = decoded(picture.data) if isinstance(picture, Picture) else picture
    return np.asarray(image.convert("RGB"), dtype=int)


def expected(stock: Any, **arguments: Any) -> np.ndarray:
    """What diffusers alone makes of :func:`request` with the sampler ``euler``, of the same noise."""
    asked = {"prompt": PROMPT, "negative_prompt": "", "guidance_scale": 4.0} | arguments
    return pixels(run(stock, width=64, height=64, steps=4, seed=7, **asked))


def test_picture_is_the_stock_pipelines(engine: DiffusionEngine, stock: StableDiffusionPipeline) -> None:
    """Pixel for pixel, a picture is what diffusers alone makes from the same weights and parameters."""
    assert alike(pixels(make(engine, sampling_method="euler")), expected(stock))


def test_guidance_below_one_mixes_the_negative_prompt_in(
    engine: DiffusionEngine, stock: StableDiffusionPipeline
) -> None:
    """With a cfgScale below 1 the negative prompt tells: at nearly 0, the picture is that prompt's own."""
    other = sample_model.prompt("blue", "gem", "stone")
    alone = expected(stock, prompt=other, guidance_scale=1.0)
    found = make(engine, sampling_method="euler", cfg_scale=0.0001, negative_prompt=other)
    assert np.abs(pixels(found) - alone).mean() < 0.1
    mixed = make(engine, sampling_method="euler", cfg_scale=0.5, negative_prompt=other)
    assert np.abs(pixels(mixed) - alone).mean() > 1


def test_picture_from_picture_is_the_stock_pipelines(
    engine: DiffusionEngine, stock: StableDiffusionPipeline
) -> None:
    """Pixel for pixel, image-to-image is what diffusers alone makes of the same start."""
    picture = make(engine, sampling_method="euler", inputs=Inputs(encoded(scene())), denoise=0.6)
    assert alike(pixels(picture), expected(stock, picture=scene(), denoise=0.6))
    assert (picture.meta["denoise"], picture.meta["stepsRun"]) == (0.6, 3)


def test_inpainting_changes_what_is_white_and_nothing_else(
    engine: DiffusionEngine, stock: StableDiffusionPipeline
) -> None:
    """Inside the mask the picture is diffusers' own; outside, every pixel is the initial picture's."""
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    inputs = Inputs(encoded(scene()), encoded(mask))
    found = pixels(make(engine, sampling_method="euler", inputs=inputs, denoise=1.0))
    inside = np.asarray(mask) > 0
    assert alike(found[inside], expected(stock, picture=scene(), mask=mask)[inside])
    assert (found[~inside] == pixels(scene())[~inside]).all()
    assert (found[inside] != pixels(scene())[inside]).any()


@pytest.mark.parametrize(
    "starting", [Starting(), Starting(scene()), Starting(scene(), Image.new("L", (64, 64), 255))]
)
def test_half_precision_makes_nearly_the_same_picture(starting: Starting) -> None:
    """With weights in half precision, as on a GPU, every kind of job gives nearly the same picture."""
    asked = request(denoise=0.75)
    from_image = starting.picture is not None
    parameters = resolve(asked.task, asked.defaults, EngineDefaults(), from_image=from_image)
    sections = identify([SAMPLE]).sections
    single, half = (
        LoadedModel(
            SAMPLE_FAMILY,
            {
                name: load_part(part, sections[name], torch.device("cpu"), dtype)
                for name, part in SAMPLE_FAMILY.parts.items()
            },
        ).render(parameters, starting, ignore, Cancel())
        for dtype in (torch.float32, torch.float16)
    )
    assert np.abs(pixels(single.picture) - pixels(half.picture)).mean() < 1


def test_denoise_zero_gives_the_picture_back(engine: DiffusionEngine) -> None:
    """With a denoise of 0 nothing may change, and nothing does."""
    assert (pixels(make(engine, inputs=Inputs(encoded(scene())), denoise=0)) == pixels(scene())).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_little_denoise_works_with_every_sampler(engine: DiffusionEngine, sampler: str) -> None:
    """Image-to-image with hardly any denoise makes a picture near the initial one, with every sampler."""
    picture = make(engine, inputs=Inputs(encoded(scene())), denoise=0.05, steps=3, sampling_method=sampler)
    assert decoded(picture.data).size == (64, 64)


@pytest.mark.parametrize("sampler", ["euler_a", "dpm++2s_a", "lcm"])
def test_same_seed_same_bytes(engine: DiffusionEngine, sampler: str) -> None:
    """The same seed gives the same file, with samplers that draw noise at every step too; another seed does
    not.
    """
    first = make(engine, sampling_method=sampler, ext="webp")
    torch.manual_seed(99)  # whatever else the process drew
    assert make(engine, sampling_method=sampler, ext="webp").data == first.data
    assert make(engine, sampling_method=sampler, ext="webp", seed=8).data != first.data


def test_drawn_seed_is_reported_and_makes_the_picture_again(engine: DiffusionEngine) -> None:
    """Without a seed one is drawn; asking with the reported one gives the same picture."""
    first = make(engine, seed=None)
    assert make(engine, seed=first.meta["seed"]).data == first.data


def test_negative_prompt_and_guidance_matter(engine: DiffusionEngine) -> None:
    """A negative prompt changes the picture, as does the guidance."""
    plain = make(engine).data
    assert make(engine, negative_prompt="green, grass").data != plain
    assert make(engine, cfg_scale=1.5).data != plain


def test_meta_tells_what_made_the_picture(engine: DiffusionEngine) -> None:
    """generationMeta tells everything that was decided, and where and how long it was computed."""
    meta = dict(make(engine, width=70, steps=3, ext="jpg").meta)
    times = meta.pop("times")
    assert meta == {
        "seed": 7,
        "steps": 3,
        "sampler": "euler_a",
        "guidance": 4.0,
        "width": 128,
        "askedWidth": 70,
        "askedHeight": 64,
        "height": 64,
        "model": "sample-model",
        "workerVersion": __version__,
        "engine": "sd-cpp",
        "family": "sample",
        "device": "cpu",
        "dtype": "float32",
        "conventions": "stable-diffusion.cpp master-669-2d40a8b",
        "stepsRun": 3,
    }
    assert set(times) == {"load", "generate", "encode"}
    assert times["generate"] > 0


@pytest.mark.parametrize(("ext", "format_"), [("webp", "WEBP"), ("png", "PNG"), ("jpg", "JPEG")])
def test_picture_comes_in_the_format_and_size_asked_for(
    engine: DiffusionEngine, ext: str, format_: str
) -> None:
    """webp, png and jpg come out as such, at the size that is reported."""
    picture = make(engine, ext=ext, width=70, steps=1)
    image = Image.open(io.BytesIO(picture.data))
    assert (picture.ext, image.format, image.size) == (ext, format_, (128, 64))


@pytest.mark.parametrize(("sampler", "calls"), [("euler", 4), ("heun", 7), ("dpm++2s_a", 7)])
def test_progress_counts_every_evaluation(engine: DiffusionEngine, sampler: str, calls: int) -> None:
    """Progress comes at every model evaluation and ends at its total, for samplers that make two a step
    too.
    """
    seen: list[tuple[int, int]] = []
    engine.generate(
        request(sampling_method=sampler), lambda done, total: seen.append((done, total)), Cancel()
    )
    assert [each for each in seen if each[0]] == [(done, calls) for done in range(1, calls + 1)]


@settings(max_examples=6, deadline=None)
@given(step=st.integers(0, 4))
def test_cancellation_stops_at_that_step(engine: DiffusionEngine, step: int) -> None:
    """A job stops at the very step at which it is cancelled, and the engine works on."""
    seen: list[int] = []
    cancel = Cancel()

    def progress(done: int, _total: int) -> None:
        seen.append(done)
        if done == step:
            cancel.set("enough")

    if step == 0:
        cancel.set("enough")
    with pytest.raises(JobCancelled, match="enough"):
        engine.generate(request(), progress, cancel)
    assert [done for done in seen if done] == list(range(1, step + 1))
    assert make(engine).data == make(engine).data


def test_cancelled_job_leaves_no_tensor_and_no_trace(engine: DiffusionEngine) -> None:
    """What a stopped job had in memory is let go at once, and the next picture is a fresh process's."""
    make(engine)
    gc.collect()
    before = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
    cancel = Cancel()
    with pytest.raises(JobCancelled) as held:  # whoever logs the error holds its frames meanwhile
        engine.generate(request(seed=7), lambda done, _total: cancel.set("enough"), cancel)
    gc.collect()
    assert sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()) == before
    assert held.traceback
    script = (
        "import sys\n"
        "from tests.lab.memory import DiffusionEngine, made\n"
        "sys.stdout.buffer.write(made(DiffusionEngine('cpu')).data)\n"
    )
    fresh = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=240)
    assert make(engine).data == fresh.stdout


def test_long_prompt_is_read_to_its_end(engine: DiffusionEngine) -> None:
    """Words beyond the text encoder's window count as those within it; a negative prompt may be as long."""
    filler = "grass background, " * 12
    first = make(engine, prompt=f"{PROMPT}, {filler} blue")
    assert first.data != make(engine, prompt=f"{PROMPT}, {filler} green").data
    assert first.data != make(engine, prompt=f"{PROMPT}, {filler} blue", negative_prompt=f"{filler} red").data
    assert "promptTruncated" not in first.meta


def test_window_is_what_it_would_be_alone(stock: StableDiffusionPipeline) -> None:
    """The windows of a long prompt are encoded as prompts of their own, one behind the other."""
    tokenizer, encoder = stock.tokenizer, stock.text_encoder
    room = tokenizer.model_max_length - 2
    assert len(tokenizer("red", add_special_tokens=False).input_ids) == 1
    words = ["red"] * room + ["blue"] * 3
    with torch.no_grad():
        ((whole, _), (short, _)) = clip_prompts.embeddings(
            [(tokenizer, encoder)], [" ".join(words), "gem"], "cpu"
        )
        alone = [
            stock.encode_prompt(text, "cpu", 1, False)[0] for text in ("red " * room, "blue " * 3, "gem")
        ]
    assert whole.shape == short.shape
    assert torch.allclose(whole, torch.cat(alone[:2], dim=1), atol=1e-5)
    assert torch.allclose(short[:, : room + 2], alone[2], atol=1e-5)


def test_endless_prompt_is_cut_and_says_so(engine: DiffusionEngine) -> None:
    """A prompt of thousands of words still makes a picture, and generationMeta says it was cut; not of a
    negative prompt that nothing reads, since there is no guidance.
    """
    endless = f"{PROMPT} " * 100
    assert make(engine, prompt=endless, steps=1).meta["promptTruncated"] is True
    assert make(engine, negative_prompt=endless, steps=1).meta["promptTruncated"] is True
    assert "promptTruncated" not in make(engine, negative_prompt=endless, steps=1, cfg_scale=1.0).meta


def test_prompts_never_reach_a_log(
    engine: DiffusionEngine, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """No word of a prompt is logged or printed, not even of one that is cut off."""
    caplog.set_level(logging.DEBUG)
    libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for library in libraries:
        library.addHandler(caplog.handler)  # theirs do not propagate to the root
    try:
        make(engine, prompt="secretword " * 200, negative_prompt="secretword " * 600, steps=1)
        with pytest.raises(JobError):
            make(engine, prompt="secretword " * 200, sampling_method="nonsense")
    finally:
        for library in libraries:
            library.removeHandler(caplog.handler)
    printed = capfd.readouterr()
    assert "secretword" not in caplog.text + printed.out + printed.err
    assert "%|" not in printed.err  # no progress bars either


def test_lone_surrogates_in_a_prompt_are_survived(engine: DiffusionEngine) -> None:
    """A prompt with half a character, which JSON can carry, makes a picture."""
    asked = request(steps=1)
    task = asked.task.model_copy(update={"prompt": "a \ud800 potion", "negative_prompt": "\udfff"})
    assert make(engine, Request("job", "m", task, asked.defaults, asked.files)).data


class TestWhatIsRefused:
    """Requests that no try will mend; the engine says why, and works on."""

    @pytest.mark.parametrize(
        ("task", "says"),
        [
            ({"sampling_method": "nonsense"}, "unknown samplingMethod 'nonsense'"),
            ({"ext": "gif"}, "unknown ext 'gif'"),
            ({"width": 20_000, "height": 20_000}, "width 20000 px is outside 16 to 4096 px"),
            ({"width": 4096, "height": 4096}, "4096x4096 px is more than 8388608 pixels in all"),
            ({"steps": 151}, "151 steps"),
            ({"inputs": Inputs(ref_image=encoded(scene()))}, "works only with .*, not with refImageUrl"),
            ({"inputs": Inputs(init_image=b"x", ref_image=b"x")}, "initImageUrl and refImageUrl in one task"),
            ({"inputs": Inputs(mask=encoded(scene()))}, "maskUrl without initImageUrl"),
            ({"inputs": Inputs(init_image=b"no picture")}, "initial picture is not a picture"),
            (
                {"inputs": Inputs(encoded(Image.new("1", (20_000, 20_000))))},
                "initial picture has more than 64000000 pixels",
            ),
            (
                {"inputs": Inputs(encoded(scene()), encoded(Image.new("L", (1, 1), 255)))},
                "mask has 1x1 px; it needs 8 px a side at least",
            ),
            (
                {"inputs": Inputs(encoded(scene()), encoded(Image.new("L", (8, 8))))},
                "mask is black everywhere",
            ),
            ({"files": ()}, "no file of role model"),
            ({"files": (SAMPLE, SAMPLE)}, "2 files of role model"),
            ({"files": (SAMPLE, SAMPLE._replace(role="lora"))}, "LoRA sample.safetensors"),
        ],
    )
    def test_request_is_refused(self, engine: DiffusionEngine, task: dict[str, Any], says: str) -> None:
        """A request that cannot be met is refused in words that say which part of it."""
        with pytest.raises(JobError, match=says) as caught:
            make(engine, **task)
        assert caught.value.is_final_here

    def test_picture_that_was_not_fetched(self, engine: DiffusionEngine) -> None:
        """A task with an initial picture that never arrived is not silently done without it."""
        with pytest.raises(JobError, match="initImageUrl") as caught:
            make(engine, init_image_url="https://studio/picture")
        assert caught.value.retryable

    def test_unknown_device(self) -> None:
        """An engine for a device that cannot be used is never made, on the CPU least of all."""
        with pytest.raises(DeviceError):
            DiffusionEngine("cuda:7" if not torch.cuda.is_available() else "cuda:99")


class TestBadWeights:
    """Weights that are not what they should be."""

    @pytest.mark.parametrize("tensor", [UNET_BIAS, VAE_BIAS, TEXT_BIAS])
    def test_nan_is_no_black_picture(self, engine: DiffusionEngine, tmp_path: Path, tensor: str) -> None:
        """A model that computes NaN fails the job instead of delivering black; another card may do it."""

        def spoil(tensors: dict[str, Any]) -> None:
            tensors[tensor][0] = float("nan")

        with pytest.raises(JobError, match="not finite") as caught:
            make(engine, files=(changed_sample(tmp_path / "nan.safetensors", spoil),))
        assert caught.value.retryable

    @pytest.mark.parametrize(
        "part", ["model.diffusion_model.mid", "first_stage_model.enc", "cond_stage_model"]
    )
    def test_missing_tensor(self, engine: DiffusionEngine, tmp_path: Path, part: str) -> None:
        """A checkpoint that lacks a tensor is refused before it makes anything."""

        def drop(tensors: dict[str, Any]) -> None:
            del tensors[next(name for name in tensors if name.startswith(part) and "norm" in name)]

        with pytest.raises(JobError) as caught:
            make(engine, files=(changed_sample(tmp_path / "incomplete.safetensors", drop),))
        assert caught.value.is_final_here
        assert "incomplete.safetensors" in str(caught.value)

    def test_misshapen_tensor(self, engine: DiffusionEngine, tmp_path: Path) -> None:
        """A checkpoint with a tensor of another shape is refused before it makes anything."""

        def reshape(tensors: dict[str, Any]) -> None:
            name = "model.diffusion_model.time_embed.0.weight"
            tensors[name] = tensors[name][:, :-1].contiguous()

        with pytest.raises(JobError, match=r"misshapen\.safetensors") as caught:
            make(engine, files=(changed_sample(tmp_path / "misshapen.safetensors", reshape),))
        assert caught.value.is_final_here

    def test_engine_works_on(self, engine: DiffusionEngine, tmp_path: Path) -> None:
        """After a bad file the engine makes the next picture as if nothing had been."""
        before = make(engine).data
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"\x80\x04pickle")
        with pytest.raises(JobError, match="pickle"):
            make(engine, files=(LocalFile("model", broken, "broken"),))
        assert make(engine).data == before


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[LocalFile]:
    """Three models that differ in one number."""
    folder = tmp_path_factory.mktemp("models")

    def change(by: int) -> LocalFile:
        def add(tensors: dict[str, Any]) -> None:
            tensors[VAE_BIAS] += by / 100

        return changed_sample(folder / f"{by}.safetensors", add)

    return [change(by) for by in (1, 2, 3)]


class TestResidency:
    """Loaded models stay loaded, within a budget."""

    @staticmethod
    def loads(engine: DiffusionEngine, model: LocalFile) -> bool:
        """Whether a picture of ``model`` had to load it."""
        return make(engine, files=(model,), steps=1).timings_s["load"] > 0

    def test_second_picture_loads_nothing(self, models: list[LocalFile]) -> None:
        """The second picture of a model reports a loading time of 0, image-to-image and inpainting
        included.
        """
        engine = DiffusionEngine("cpu")
        assert self.loads(engine, models[0])
        assert not self.loads(engine, models[0])
        for inputs in (
            Inputs(encoded(scene())),
            Inputs(encoded(scene()), encoded(Image.new("L", (64, 64), 255))),
        ):
            assert make(engine, files=(models[0],), inputs=inputs).timings_s["load"] == 0

    def test_contents_count_not_names(self, models: list[LocalFile], tmp_path: Path) -> None:
        """The same bytes under another name are not loaded twice; other bytes under the same name are."""
        engine = DiffusionEngine("cpu")
        assert self.loads(engine, models[0])
        renamed = tmp_path / "other-name.safetensors"
        renamed.write_bytes(models[0].path.read_bytes())
        assert not self.loads(engine, models[0]._replace(path=renamed))
        assert self.loads(engine, models[0]._replace(content="new"))

    def test_least_recently_used_leaves(self, models: list[LocalFile]) -> None:
        """When the budget is full, the model that was not used for longest leaves, and no other."""
        size = 4 * sum(parameter.numel() for parameter in sample_tensors())
        engine = DiffusionEngine("cpu", budget_bytes=int(2.5 * size))
        a, b, c = models
        assert [self.loads(engine, m) for m in (a, b, a)] == [True, True, False]
        assert self.loads(engine, c)  # b leaves
        assert [self.loads(engine, m) for m in (a, c)] == [False, False]
        assert self.loads(engine, b)

    def test_model_larger_than_the_budget_works_alone(self, models: list[LocalFile]) -> None:
        """A model that exceeds the budget by itself still makes pictures; nothing stays beside it."""
        engine = DiffusionEngine("cpu", budget_bytes=1)
        a, b, _ = models
        assert [self.loads(engine, m) for m in (a, a, b, a)] == [True, False, True, True]

    def test_resident_models_are_told_by_name(self) -> None:
        """What is in memory, and how much of the device is in use, can be asked from outside."""
        router = Router({"sd-cpp": lambda: DiffusionEngine("cpu")})
        assert (router.resident(), router.used_bytes()) == ({}, None)
        router.for_source(ModelSource(engine="sd-cpp")).generate(request(), lambda *_: None, Cancel())
        assert list(router.resident()) == ["sample-model"]
        assert router.resident()["sample-model"].size_bytes >= 4 * sum(
            tensor.numel() for tensor in sample_tensors()
        )
        assert (router.used_bytes() or 0) > router.resident()["sample-model"].size_bytes

    def test_model_that_left_is_resident_no_more(self) -> None:
        """A model of which a component has left is not called resident."""
        device = torch.device("cpu")
        residency = Residency(device, MachineMemory(device), budget_bytes=100)
        first, second = (Key(kind, "content", torch.float32) for kind in ("a", "b"))
        for key in (first, second):
            residency.add(key, torch.nn.Linear(2, 2))
        residency.name("one", [first])
        residency.name("both", [first, second])
        assert residency.models == {"one": (24, "device", False), "both": (48, "device", False)}
        residency.make_room(60, keep=[second])
        assert residency.models == {}


def sample_tensors() -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(sample_model.WEIGHTS).values())


def test_models_default_sampler_wins_over_the_engines(engine: DiffusionEngine) -> None:
    """What a source's cliDefaults say holds where the task is silent."""
    defaults = CliDefaults(width=64, height=128, steps=2, cfg_scale=3.0, sampling_method="dpm++2m")
    meta = make(engine, defaults=defaults, steps=20).meta
    decided = [meta[name] for name in ("width", "height", "steps", "guidance", "sampler")]
    assert decided == [64, 128, 2, 3.0, "dpm++2m"]


def test_flow_shift_means_nothing_to_models_of_noise(engine: DiffusionEngine) -> None:
    """What only flow models know changes no other picture, and is not told as if it had."""
    shifted = make(
        engine, defaults=request().defaults.model_copy(update={"flow_shift": 3.0, "zero_cond_t": True})
    )
    assert shifted.data == make(engine).data
    assert "flowShift" not in shifted.meta
