"""Published layouts: every tensor found, every other one explained, both directions bit for bit; equal to diffusers in each family."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisd.checkpoints import open_checkpoint
from minisd.conditional_unet import ConditionalUNet, ConditionalUNetConfig
from minisd.config import (
    FAMILIES,
    read_text_config,
    read_unet_config,
    read_vae_config,
    text_settings,
    unet_settings,
    vae_settings,
)
from minisd.conversion import convert
from minisd.layouts import OLD_ATTENTION, ldm_places, ldm_unet_name, ldm_vae_name
from minisd.loading import load, probe_prediction
from minisd.sizes import infer_unet
from minisd.text_encoder import TextConfig, TextEncoder
from minisd.vae import AutoencoderKL, VAEConfig
from tests.real_models import (
    FAMILY_NAMES,
    averaged_copy,
    off,
    open_clip_tower,
    reference_texts,
    reference_unet,
    reference_vae,
    save_reference,
    shake,
    small_tokenizer,
    write_single,
)

CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A diffusers folder of each family, as diffusers and transformers save it."""
    root = tmp_path_factory.mktemp("folders")
    return {family: save_reference(family, root / family) for family in FAMILY_NAMES}


@pytest.fixture(scope="session")
def singles(folders, tmp_path_factory):
    """A single file of each family, and its tensors."""
    root = tmp_path_factory.mktemp("singles")
    return {
        family: (root / f"{family}.safetensors", write_single(family, folders[family], root / f"{family}.safetensors"))
        for family in folders
    }


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The small tokenizer as a folder, for single files."""
    return small_tokenizer().save(tmp_path_factory.mktemp("tokenizer"))


def rewritten(path, target, change):
    """A single file whose tensors `change` has changed in place, or replaced."""
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)
    return target


def inputs(unet_config, count=2):
    """Something to ask a UNet: latents, timesteps, text, and what XL needs besides."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, unet_config.in_channels, 8, 16, generator=generator)
    context = torch.randn(count, 7, unet_config.cross_attention_dim, generator=generator)
    more = {}
    if unet_config.pooled_dim:
        more["pooled"] = torch.randn(count, unet_config.pooled_dim, generator=generator)
        more["time_ids"] = torch.tensor([[64.0, 48, 0, 3, 64, 64], [32, 32, 8, 0, 64, 64]])[:count]
    return x, torch.tensor([3, 870])[:count], context, more


def theirs(unet, x, t, context, more):
    """What diffusers' UNet answers."""
    added = {"added_cond_kwargs": {"text_embeds": more["pooled"], "time_ids": more["time_ids"]}} if more else {}
    with torch.no_grad():
        return unet(x, t, encoder_hidden_states=context, **added).sample


# Sizes and names


PUBLISHED = {
    "sd1": ConditionalUNetConfig(),
    "sd2": ConditionalUNetConfig(heads=(5, 10, 20, 20), cross_attention_dim=1024, linear_projection=True),
    "sdxl": ConditionalUNetConfig(
        block_out_channels=(320, 640, 1280),
        heads=(5, 10, 20),
        depths=(0, 2, 10),
        middle_depth=10,
        cross_attention_dim=2048,
        linear_projection=True,
        pooled_dim=1280,
        time_ids_dim=256,
        sample_size=128,
    ),
}


@pytest.mark.parametrize(
    ("family", "tensors", "numbers"), [("sd1", 686, 859_520_964), ("sd2", 686, 865_910_724), ("sdxl", 1680, 2_567_463_684)]
)
def test_published_unets(family, tensors, numbers):
    """Count, names and shapes of the published sizes, on the meta device; and the sizes again from the names of a single file."""
    from diffusers import UNet2DConditionModel

    config = PUBLISHED[family]
    with torch.device("meta"):
        ours, reference = ConditionalUNet(config), UNet2DConditionModel.from_config(unet_settings(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    assert len(shapes) == tensors and sum(parameter.numel() for parameter in ours.parameters()) == numbers
    assert {name: tuple(tensor.shape) for name, tensor in ours.state_dict().items()} == {
        name: shape[:2] if "proj_in" in name or "proj_out" in name else shape for name, shape in shapes.items()
    }
    attends = [depth > 0 for depth in config.depths]
    ldm = {ldm_unet_name(name, 2, attends): shape for name, shape in shapes.items()}
    assert len(ldm) == tensors
    assert infer_unet(lambda name: ldm.get(ldm_unet_name(name, 2, ())), len(config.block_out_channels), 2) == config
    doublings = {name for name in ldm if re.match(r"output_blocks\.\d+\.\d\.conv\.weight", name)}
    expected = ("2.1", "5.2", "8.2") if family != "sdxl" else ("2.2", "5.2")
    assert doublings == {f"output_blocks.{where}.conv.weight" for where in expected}


def test_published_autoencoder():
    with torch.device("meta"):
        model = AutoencoderKL()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert len(shapes) == 248 == len({ldm_vae_name(name, 4) for name in shapes})
    assert sum(shape.numel() for shape in shapes.values()) == 83_653_863
    way_in = sum(parameter.numel() for part in (model.encoder, model.quant_conv) for parameter in part.parameters())
    assert way_in == 34_163_664


@pytest.mark.parametrize(
    ("config", "tensors", "numbers", "in_single_files"),
    [
        (TextConfig(), 196, 123_060_480, 196),
        (TextConfig(49408, 1024, 4096, 23, 16, 77, "gelu"), 372, 340_387_840, 280),
        (TextConfig(49408, 1280, 5120, 32, 20, 77, "gelu", projection_dim=1280), 517, 694_659_840, 390),
    ],
    ids=["ViT-L", "ViT-H", "bigG"],
)
def test_published_text_encoders(config, tensors, numbers, in_single_files):
    """As many tensors in a folder as in the published ones; in a single file OpenCLIP's, where queries, keys and values are one."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in TextEncoder(config).state_dict().items()}
    assert len(shapes) == tensors and sum(shape.numel() for shape in shapes.values()) == numbers
    family = {768: "sd1", 1024: "sd2", 1280: "sdxl"}[config.hidden_size]
    places = ldm_places("text_encoder_2" if family == "sdxl" else "text_encoder", family)
    kept = {places(name)[0].name for name in shapes}
    assert len(kept) + (family == "sdxl") == in_single_files  # besides there is CLIP's temperature


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_configurations_go_both_ways(family):
    unet, vae = reference_unet(family), reference_vae(family)
    config = read_unet_config(json.loads(unet.to_json_string()))
    assert read_unet_config(json.loads(json.dumps(unet_settings(config)))) == config
    vae_config = read_vae_config(json.loads(vae.to_json_string()))
    assert read_vae_config(json.loads(json.dumps(vae_settings(vae_config)))) == vae_config
    for encoder in reference_texts(family).values():
        text = read_text_config(encoder.config.to_dict() | {"architectures": [type(encoder).__name__]})
        assert read_text_config(json.loads(json.dumps(text_settings(text)))) == text


def test_old_configurations_leave_much_out():
    assert read_unet_config({"cross_attention_dim": 768}) == ConditionalUNetConfig()
    assert read_vae_config({"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}) == VAEConfig()
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    assert read_text_config(sizes | {"architectures": ["CLIPTextModel"], "projection_dim": 768}) == TextConfig()
    from transformers import CLIPTextConfig

    assert read_text_config(CLIPTextConfig().to_dict()) == read_text_config({})  # what transformers takes for what is left out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_fn": "gelu"}, "a UNet with act_fn 'gelu' is not built here; known is 'silu'"),
        ({"_class_name": "FluxTransformer2DModel"}, "the UNet is a FluxTransformer2DModel; known is UNet2DConditionModel"),
        ({"class_embed_type": "projection"}, "a UNet with class_embed_type 'projection' is not built here"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image' is not built here"),
        ({"down_block_types": ["KDownBlock2D"] * 4}, "a UNet with a KDownBlock2D is not built here"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "the way up must mirror the way down"),
        ({"layers_per_block": [1, 2, 2, 2]}, "whose levels differ in layers_per_block"),
        ({"attention_head_dim": [8, 8]}, "4 levels need 4 heads"),
    ],
)
def test_unet_configurations_that_are_not_built(changes, message):
    with pytest.raises(ValueError, match=message):
        read_unet_config({"cross_attention_dim": 768} | changes)


def test_other_configurations_that_are_not_built():
    with pytest.raises(ValueError, match="a VAE with use_quant_conv False is not built here"):
        read_vae_config({"use_quant_conv": False})
    with pytest.raises(ValueError, match="the text encoder is a T5EncoderModel"):
        read_text_config({"architectures": ["T5EncoderModel"]})
    with pytest.raises(ValueError, match="hidden_act 'relu' is not built here"):
        read_text_config({"hidden_act": "relu"})


# Equal to the reference libraries


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_folder_gives_the_answers_of_diffusers(family, folders):
    loaded = load(folders[family], **CPU)
    assert loaded.checkpoint.key == family and loaded.checkpoint.layout == "diffusers" and not loaded.notes
    question = inputs(loaded.unet.config)
    with torch.no_grad():
        assert off(loaded.unet(*question[:3], **question[3]), theirs(reference_unet(family), *question)) <= 1e-5
        vae, pictures = reference_vae(family), question[0].new_tensor(0).uniform_(-1, 1).expand(1, 3, 32, 16).clone().uniform_(-1, 1)
        latents = loaded.vae.encode(pictures)
        assert off(latents, vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor) <= 1e-5
        assert off(loaded.vae.decode(latents), vae.decode(latents / vae.config.scaling_factor).sample) <= 1e-5


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_texts_are_those_of_the_pipelines_of_diffusers(family, folders):
    """`encode` against diffusers' own encode_prompt, which says what each family's UNet hears."""
    import diffusers

    loaded = load(folders[family], **CPU)
    texts = ["a red boat at night", "a"]
    told, nothing = loaded.encode(texts), loaded.encode_nothing()
    parts = dict(reference_texts(family), vae=reference_vae(family), unet=reference_unet(family), scheduler=diffusers.DDIMScheduler())
    from transformers import CLIPTokenizer

    folder = folders[family]
    parts["tokenizer"] = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    with torch.no_grad():
        if family == "sdxl":
            parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
            pipeline = diffusers.StableDiffusionXLPipeline(**parts)
            context, without, pooled, pooled_without = pipeline.encode_prompt(texts, do_classifier_free_guidance=True)
            assert off(told["pooled"], pooled) <= 1e-5
            assert not nothing["pooled"].any() and not pooled_without.any()
        else:
            pipeline = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)
            context, without = pipeline.encode_prompt(texts, "cpu", 1, True)
    assert off(told["context"], context) <= 1e-5
    assert nothing["context"].shape == (1, *context.shape[1:])
    if without.any():
        assert off(nothing["context"].expand_as(without), without) <= 1e-5
    else:
        assert family == "sdxl" and not nothing["context"].any()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_single_file_gives_the_same(family, singles, folders, tokenizer):
    """UNet and VAE are those of the folder, bit for bit; the texts are those of open_clip's towers, or of the folder."""
    path, _ = singles[family]
    loaded, folder = load(path, **CPU, tokenizer=tokenizer, prediction_type="epsilon"), load(folders[family], **CPU)
    assert loaded.checkpoint.key == family and loaded.checkpoint.layout == "ldm"
    for ours, reference in ((loaded.unet, folder.unet), (loaded.vae, folder.vae), (loaded.text_encoders[0], folder.text_encoders[0])):
        if family == "sd2" and ours is loaded.text_encoders[0]:
            continue
        for (name, tensor), other in zip(ours.state_dict().items(), reference.state_dict().values()):
            assert torch.equal(tensor, other), name
    ids = loaded.tokenizers[-1](["a red boat at night", "a"])
    assert torch.equal(ids, folder.tokenizers[-1](["a red boat at night", "a"]))
    assert loaded.scheduler.offset == 1 and loaded.scheduler.prediction_type == "epsilon"
    if family == "sd1":
        return
    tower, states = open_clip_tower(64, 24) if family == "sd2" else open_clip_tower(128, 4), []
    for block in tower.transformer.resblocks:
        block.register_forward_hook(lambda module, arguments, output: states.append(output))
    with torch.no_grad():
        pooled, _ = tower(ids)
        told = loaded.encode(["a red boat at night", "a"])
        expected = tower.ln_final(states[-2]) if family == "sd2" else states[-2]
    assert off(told["context"][..., -expected.shape[-1] :], expected) <= 1e-5
    assert family == "sd2" or off(told["pooled"], pooled) <= 1e-5


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_diffusers_reads_the_single_file(family, singles, folders):
    """The names of our single files, read by diffusers' own converters."""
    from diffusers.loaders import single_file_utils

    _, tensors = singles[family]
    unet, vae = reference_unet(family), reference_vae(family)
    found = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))
    assert found.keys() == unet.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in unet.state_dict().items())
    found = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config))
    assert found.keys() == vae.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_diffusers_reads_our_open_clip_names(family, folders, tmp_path):
    """A folder's transformers tower, written as OpenCLIP by `convert`, and read back by diffusers."""
    from diffusers.loaders import single_file_utils

    convert(folders[family], tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    name, prefix = {"sd2": ("text_encoder", "cond_stage_model.model."), "sdxl": ("text_encoder_2", "conditioner.embedders.1.model.")}[
        family
    ]
    encoder = reference_texts(family)[name]
    found = single_file_utils.convert_open_clip_checkpoint(encoder, tensors, prefix)
    wanted = encoder.state_dict()
    found = {key if key in wanted else key.removeprefix("text_model."): tensor for key, tensor in found.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


# Conversion


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_conversion_and_back_keeps_every_bit(family, folders, singles, tokenizer, tmp_path):
    path, tensors = singles[family]
    convert(path, tmp_path / "folder", tokenizer=tokenizer, prediction_type="epsilon")
    checkpoint = convert(tmp_path / "folder", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    dropped = {name for names in open_checkpoint(path).ignored.values() for name in names}
    assert back.keys() == tensors.keys() - dropped and checkpoint.ignored == {}
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    for part in ("unet", "vae"):  # and the folder holds what diffusers had saved
        weights = load_file(tmp_path / "folder" / part / "diffusion_pytorch_model.safetensors")
        original = load_file(folders[family] / part / "diffusion_pytorch_model.safetensors")
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in original.items())


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_diffusers_opens_a_converted_folder(family, singles, tokenizer, tmp_path, caplog):
    import diffusers

    convert(singles[family][0], tmp_path / "folder", tokenizer=tokenizer, prediction_type="epsilon")
    kind = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
    pipeline = kind.from_pretrained(tmp_path / "folder", low_cpu_mem_usage=False)
    loaded = load(tmp_path / "folder", **CPU)
    question = inputs(loaded.unet.config)
    with torch.no_grad():
        assert off(loaded.unet(*question[:3], **question[3]), theirs(pipeline.unet.eval(), *question)) <= 1e-5
    ids = loaded.tokenizers[0](["a red boat at night"])
    assert torch.equal(ids, pipeline.tokenizer(["a red boat at night"], padding="max_length", return_tensors="pt").input_ids)
    with torch.no_grad():
        expected = pipeline.text_encoder(ids)[0]
    assert off(loaded.text_encoders[0](ids).sequence, expected) <= 1e-5
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_conversion_to_another_dtype(folders, tmp_path):
    convert(folders["sd1"], tmp_path / "half.safetensors", dtype=torch.float16)
    half, full = open_checkpoint(tmp_path / "half.safetensors"), open_checkpoint(folders["sd1"])
    assert set(half.parts["unet"].dtypes()) == {"float16"} and set(full.parts["unet"].dtypes()) == {"float32"}
    for name in list(full.parts["unet"].shapes)[::40]:
        assert torch.equal(half.parts["unet"].tensor(name), full.parts["unet"].tensor(name).half())
    loaded = half.parts["vae"].load(torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_folder_is_not_overwritten_and_a_failure_leaves_nothing(folders, singles, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    convert(folders["sd1"], tmp_path / "full")  # beside what is there
    before = {path: path.read_bytes() for path in (tmp_path / "full").rglob("*") if path.is_file()}
    for target in (tmp_path / "full", tmp_path / "full" / "mine"):
        with pytest.raises(FileExistsError, match="holds a model already, or is a file; name a new folder"):
            convert(folders["sd2"], target)
    assert {path: path.read_bytes() for path in (tmp_path / "full").rglob("*") if path.is_file()} == before
    import minisd.conversion as module

    def fail(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "write_safetensors", fail)
    for target in ("folder", "file.safetensors"):
        with pytest.raises(OSError, match="No space left"):
            convert(folders["sd1"], tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_what_it_predicts_survives_a_single_file(folders, tokenizer, tmp_path):
    """The layout has no place for it; the metadata have."""
    checkpoint = convert(folders["sd2"], tmp_path / "v.safetensors", prediction_type="v_prediction")
    assert checkpoint.prediction_type == "epsilon"
    loaded = load(tmp_path / "v.safetensors", **CPU, tokenizer=tokenizer)
    assert loaded.scheduler.prediction_type == "v_prediction" and not any("probe" in note for note in loaded.notes)


def test_unusual_sizes_survive_a_single_file(tmp_path, tokenizer):
    """Heads, groups and schedule leave no trace in a shape; our own files say them in the metadata."""
    saved = save_reference("sd1", tmp_path / "x", norm_num_groups=16, attention_head_dim=(2, 4, 4, 8))
    convert(saved, tmp_path / "x.safetensors")
    ours, expected = load(tmp_path / "x.safetensors", **CPU, tokenizer=tokenizer), load(saved, **CPU)
    assert ours.unet.config == expected.unet.config and ours.unet.config.norm_num_groups == 16
    assert ours.scheduler.path(7) == expected.scheduler.path(7) and ours.scheduler.sampler == expected.scheduler.sampler
    question = inputs(ours.unet.config)
    with torch.no_grad():
        assert torch.equal(ours.unet(*question[:3]), expected.unet(*question[:3]))


# Strictness


def test_published_clutter_falls_under_named_rules(singles):
    for family, (path, tensors) in singles.items():
        checkpoint = open_checkpoint(path)
        counts = {rule: len(names) for rule, names in checkpoint.ignored.items()}
        schedule, temperature = "schedule, computed anew", "CLIP's temperature"
        positions = "positions 0 to 76, never read: merged files hold corrupted ones"
        expected = {
            "sd1": {schedule: 4, positions: 1},
            "sd2": {schedule: 4, temperature: 1, "projection that this family does not use": 1, "last layer that SD 2 does not use": 12},
            "sdxl": {schedule: 1, positions: 1, temperature: 1},
        }[family]
        assert counts == expected
        used = set().union(*(part.used for part in checkpoint.parts.values()))
        assert len(used) + sum(counts.values()) == len(tensors)
        text = checkpoint.describe()
        assert FAMILIES[family].name in text and "ldm layout" in text and all(rule in text for rule in counts)


def test_corrupted_positions_are_never_read(singles, tokenizer, tmp_path):
    path, _ = singles["sd1"]
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    changed = rewritten(path, tmp_path / "x.safetensors", lambda tensors: tensors.update({name: torch.full((1, 77), 3.7)}))
    ours, before = load(changed, **CPU, tokenizer=tokenizer), load(path, **CPU, tokenizer=tokenizer)
    assert torch.equal(ours.encode("a boat")["context"], before.encode("a boat")["context"])


def test_names_without_text_model(singles, folders, tokenizer, tmp_path):
    """Some early fine-tunes leave it out, and so does transformers since 5.6; older versions wrote it into folders."""
    path, _ = singles["sd1"]

    def shorter(tensors):
        return {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}

    changed = load(rewritten(path, tmp_path / "x.safetensors", shorter), **CPU, tokenizer=tokenizer)
    expected = load(path, **CPU, tokenizer=tokenizer).encode("a boat")["context"]
    assert torch.equal(changed.encode("a boat")["context"], expected)
    shutil.copytree(folders["sd1"], tmp_path / "folder")
    weights = load_file(tmp_path / "folder/text_encoder/model.safetensors")
    for prefix in ("", "text_model."):
        renamed = {prefix + name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
        save_file(renamed, tmp_path / "folder/text_encoder/model.safetensors")
        assert torch.equal(load(tmp_path / "folder", **CPU).encode("a boat")["context"], expected)


@pytest.mark.parametrize("shape", [(1, 1), (1,), ()])
def test_old_attention_of_the_autoencoder(folders, tmp_path, shape):
    """The first folders named the projections query, key, value, proj_attn; and 1x1 convolutions are the same numbers."""
    shutil.copytree(folders["sd1"], tmp_path / "x")
    file = tmp_path / "x/vae/diffusion_pytorch_model.safetensors"
    weights, renamed = load_file(file), {}
    for name, tensor in weights.items():
        for new, old in OLD_ATTENTION.items():
            if ".attentions." in name and new in name:
                name = name.replace(new, old)
                tensor = tensor.reshape(*tensor.shape, *shape) if tensor.ndim == 2 else tensor
        renamed[name] = tensor
    assert sum(".query." in name or ".proj_attn." in name for name in renamed) == 8
    save_file(renamed, file)
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "x", **CPU).vae.decode(latents), load(folders["sd1"], **CPU).vae.decode(latents))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_projections_as_convolutions_or_linear_layers(family, singles, tokenizer, tmp_path):
    path, _ = singles[family]

    def other(tensors):
        for name, tensor in tensors.items():
            if re.search(r"\.proj_(in|out)\.weight$", name) and "diffusion_model" in name:
                tensors[name] = tensor.reshape(tensor.shape[:2] if tensor.ndim == 4 else (*tensor.shape, 1, 1))

    changed = load(rewritten(path, tmp_path / "x.safetensors", other), **CPU, tokenizer=tokenizer, prediction_type="epsilon")
    expected = load(path, **CPU, tokenizer=tokenizer, prediction_type="epsilon").unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in changed.unet.state_dict().items())


@pytest.mark.parametrize("zipped", [True, False])
def test_a_ckpt_gives_the_same(singles, tokenizer, tmp_path, zipped):
    """As Lightning wraps it, mapped or not; in another dtype, where queries, keys and values are cut from one tensor."""
    path, tensors = singles["sd2"]
    torch.save({"state_dict": tensors, "global_step": 875_000}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
    asked = {"dtype": torch.bfloat16, "device": "cpu", "tokenizer": tokenizer, "prediction_type": "epsilon"}
    ours, expected = load(tmp_path / "x.ckpt", **asked), load(path, **asked)
    for one, other in ((ours.unet, expected.unet), (ours.vae, expected.vae), (ours.text_encoders[0], expected.text_encoders[0])):
        assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert ours.checkpoint.aside == ["global_step"] and "beside the weights, global_step" in ours.checkpoint.describe()


def test_averaged_copy_is_used_when_asked_for(singles, tokenizer, tmp_path):
    path, tensors = singles["sd1"]
    copies = averaged_copy(tensors)
    both = rewritten(path, tmp_path / "x.safetensors", lambda found: found.update(copies))
    plain, averaged = open_checkpoint(both), open_checkpoint(both, ema=True)
    assert plain.ignored["averaged copy of the UNet (ema=True takes it)"] == sorted(name for name in copies if "diffusion" in name)
    assert len(averaged.ignored["plain copy of the UNet (ema=True takes the averaged one)"]) == len(plain.parts["unet"].shapes)
    for name in ("conv_in.weight", "mid_block.attentions.0.proj_in.weight", "up_blocks.0.upsamplers.0.conv.bias"):
        written = ldm_unet_name(name, 2, (True, True, True, False))
        flat = "model_ema.diffusion_model" + written.replace(".", "")
        assert torch.equal(averaged.parts["unet"].tensor(name).flatten(), copies[flat].flatten())
        assert torch.equal(plain.parts["unet"].tensor(name).flatten(), tensors["model.diffusion_model." + written].flatten())
    with pytest.raises(ValueError, match="holds no averaged copy of the UNet"):
        open_checkpoint(path, ema=True)


def test_missing_unknown_and_misshapen_tensors_are_named(singles, tmp_path):
    path, _ = singles["sd1"]
    name = "model.diffusion_model.middle_block.1.proj_out.bias"
    start = "model.diffusion_model."

    def put(key, tensor):
        return lambda found: found.update({key: tensor})

    def drop(key):
        return lambda found: {name: tensor for name, tensor in found.items() if name != key}

    cases = {
        rf"1 of \d+ tensors of the unet are missing .first: {name}": drop(name),
        f"holds 1 tensors that no part of the model wants and no rule explains .first: {start}x": put(start + "x", torch.zeros(1)),
        r"middle_block.1.proj_out.bias has shape \(65,\), and a unet of these sizes needs \(64,\)": put(name, torch.zeros(65)),
        "middle_block.1.proj_out.bias holds torch.int64, not fractions": put(name, torch.zeros(64, dtype=torch.int64)),
        "the tensor conv_in.weight, which tells a size of the model, is missing": drop(start + "input_blocks.0.0.weight"),
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            open_checkpoint(rewritten(path, tmp_path / "x.safetensors", change))
        assert str(caught.value).startswith("x.safetensors") and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_none(singles, tokenizer, tmp_path, number):
    def spoil(tensors):
        tensors["first_stage_model.decoder.conv_out.bias"][1] = number

    path = rewritten(singles["sd1"][0], tmp_path / "x.safetensors", spoil)
    with pytest.raises(ValueError, match="first_stage_model.decoder.conv_out.bias holds NaN or infinity: the file is damaged"):
        load(path, **CPU, tokenizer=tokenizer)


def test_numbers_too_large_for_float16(singles, tmp_path):
    def grow(tensors):
        tensors["first_stage_model.decoder.conv_out.bias"][1] = 1e6

    path = rewritten(singles["sd1"][0], tmp_path / "x.safetensors", grow)
    with pytest.raises(ValueError, match="conv_out.bias holds NaN or infinity in float16"):
        open_checkpoint(path).parts["vae"].load(torch.float16)


# Inpainting, and what is not a Stable Diffusion that can be drawn with


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_inpainting(family, tokenizer, tmp_path):
    save_reference(family, tmp_path / "x", in_channels=9)
    convert(tmp_path / "x", tmp_path / "x.safetensors")
    for path in (tmp_path / "x", tmp_path / "x.safetensors"):
        loaded = load(path, **CPU, tokenizer=tokenizer)
        assert loaded.unet.config.in_channels == 9 and loaded.checkpoint.task == "inpainting"
        assert "inpainting" in loaded.checkpoint.describe()
        question = inputs(loaded.unet.config)
        with torch.no_grad():
            assert off(loaded.unet(*question[:3]), theirs(reference_unet(family, in_channels=9), *question)) <= 1e-5
        with pytest.raises(ValueError, match="this UNet takes 9 channels: it must see more than latents, such as a picture to paint into"):
            loaded.sample("a boat", steps=1)
    convert(tmp_path / "x.safetensors", tmp_path / "y", tokenizer=tokenizer)
    assert json.loads((tmp_path / "y/model_index.json").read_text())["_class_name"] == "StableDiffusionInpaintPipeline"


@pytest.mark.parametrize(
    ("channels", "message"), [(8, "an instruct-pix2pix model"), (5, "a depth-guided model"), (6, "a UNet of 6 and 4 channels")]
)
def test_other_numbers_of_channels(singles, tmp_path, channels, message):
    def widen(tensors):
        tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(32, channels, 3, 3)

    with pytest.raises(ValueError, match=f"x.safetensors is {message}"):
        open_checkpoint(rewritten(singles["sd1"][0], tmp_path / "x.safetensors", widen))


STRANGE = {
    "lora_unet_down_blocks_0_attentions_0.lora_down.weight": "a LoRA",
    "unet.up_blocks.0.attentions.1.to_q.lora_A.weight": "a LoRA",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "double_blocks.0.img_attn.qkv.weight": "a Flux model",
    "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "a Stable Diffusion 3 model",
    "string_to_param.*": "a textual inversion",
    "decoder.conv_in.weight": "holds a VAE only",
    "first_stage_model.decoder.conv_in.weight": "holds a VAE only",
    "down_blocks.0.resnets.0.norm1.weight": "holds a UNet only",
    "model.diffusion_model.input_blocks.0.0.weight": "holds a UNet only",
    "text_model.encoder.layers.0.mlp.fc1.weight": "holds a text encoder only",
    "layers.0.weight": "holds 1 tensors of something else .first: layers.0.weight",
}


@pytest.mark.parametrize(("name", "message"), STRANGE.items())
def test_what_else_people_take_for_a_stable_diffusion(tmp_path, name, message):
    save_file({name: torch.zeros(4, 4)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"^x.safetensors (is )?{message}.*; expected is a Stable Diffusion 1, 2 or XL") as caught:
        open_checkpoint(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_the_refiner_is_named(singles, tmp_path):
    def refiner(tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("conditioner.embedders.0.")}
        return {name.replace("embedders.1.", "embedders.0."): tensor for name, tensor in tensors.items()}

    with pytest.raises(ValueError, match="is the refiner of SDXL"):
        open_checkpoint(rewritten(singles["sdxl"][0], tmp_path / "x.safetensors", refiner))


def test_texts_that_do_not_fit_the_unet(folders, tmp_path):
    shutil.copytree(folders["sd1"], tmp_path / "x")
    shutil.rmtree(tmp_path / "x/text_encoder")
    shutil.copytree(folders["sdxl"] / "text_encoder_2", tmp_path / "x/text_encoder")
    with pytest.raises(ValueError, match="the UNet hears texts 64 wide, but the text encoders make 128"):
        open_checkpoint(tmp_path / "x")


# What it predicts


def test_probe_tells_v_from_epsilon(folders, tmp_path, tokenizer):
    """A UNet that answers what it sees, and one that answers its negative."""
    unet = ConditionalUNet(read_unet_config(json.loads((folders["sd2"] / "unet/config.json").read_text())))  # fresh: answers zero
    torch.nn.init.constant_(unet.conv_out.bias, 0.5)
    assert probe_prediction(unet) == ("epsilon", pytest.approx(0.0, abs=1e-6))
    torch.nn.init.constant_(unet.conv_out.bias, -1.0)
    assert probe_prediction(unet) == ("v_prediction", pytest.approx(-1.5, abs=1e-6))


@pytest.mark.parametrize(("shift", "expected"), [(-50.0, "v_prediction"), (50.0, "epsilon")])
def test_sd2_without_a_word_is_probed_and_the_finding_reported(singles, tokenizer, tmp_path, shift, expected):
    def move(tensors):
        tensors["model.diffusion_model.out.2.bias"] += shift

    path = rewritten(singles["sd2"][0], tmp_path / "x.safetensors", move)
    assert open_checkpoint(path).prediction_type is None
    loaded = load(path, **CPU, tokenizer=tokenizer)
    assert loaded.scheduler.prediction_type == expected
    assert f"a probe says {expected} " in loaded.notes[-1]
    other = "epsilon" if expected == "v_prediction" else "v_prediction"
    told = load(path, **CPU, tokenizer=tokenizer, prediction_type=other)
    assert told.scheduler.prediction_type == other and not any("probe" in note for note in told.notes)
    with pytest.raises(ValueError, match="Unknown prediction type 'v'"):
        load(path, prediction_type="v")


def test_folders_say_what_they_predict(tmp_path):
    folder = save_reference("sd2", tmp_path / "x", prediction_type="v_prediction")
    assert load(folder, **CPU).scheduler.prediction_type == "v_prediction"


def test_markers_of_sdxl_fine_tunes(singles, tokenizer, tmp_path):
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    loaded = load(
        rewritten(singles["sdxl"][0], tmp_path / "x.safetensors", lambda tensors: tensors.update(marks)), **CPU, tokenizer=tokenizer
    )
    assert loaded.scheduler.prediction_type == "v_prediction" and "zero terminal SNR" in loaded.notes[0]
    edm = rewritten(singles["sdxl"][0], tmp_path / "y.safetensors", lambda tensors: tensors.update({"edm_vpred.sigma_max": torch.ones(1)}))
    with pytest.raises(ValueError, match="is a model trained by another rule .EDM."):
        open_checkpoint(edm)


def test_sdxl_in_float16_keeps_its_autoencoder_in_float32(folders):
    loaded = load(folders["sdxl"], torch.float16, "cpu")
    assert next(loaded.unet.parameters()).dtype == torch.float16 and next(loaded.vae.parameters()).dtype == torch.float32
    assert "overflows in float16" in loaded.notes[0]


# The door of SDXL


def test_sdxl_needs_its_vectors_and_others_refuse_them():
    config = read_unet_config(json.loads(reference_unet("sdxl").to_json_string()))
    unet = shake(ConditionalUNet(config))
    x, t, context, more = inputs(config)
    with pytest.raises(ValueError, match=r"this UNet needs pooled of shape \(2, 128\), got nothing"):
        unet(x, t, context)
    with pytest.raises(ValueError, match=r"this UNet needs time_ids of shape \(2, 6\), got \(2, 5\)"):
        unet(x, t, context, more["pooled"], more["time_ids"][:, :5])
    one = unet(x, t, context, more["pooled"], more["time_ids"][:1])
    torch.testing.assert_close(one, unet(x, t, context, more["pooled"], more["time_ids"][:1].repeat(2, 1)))
    plain = ConditionalUNet(read_unet_config(json.loads(reference_unet("sd1").to_json_string())))
    with pytest.raises(ValueError, match="takes no pooled text"):
        plain(x, t, context[..., :64], pooled=more["pooled"])


# The command line


def test_info_and_convert_on_the_command_line(folders, singles, tmp_path, capsys):
    from minisd.cli import main

    assert main(["info", str(singles["sd2"][0])]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("sd2.safetensors: SD 2.x, ldm layout\n")
    assert "ignored: 12 x last layer that SD 2 does not use" in printed and "epsilon or v: the file does not say" in printed
    assert main(["convert", str(folders["sd1"]), str(tmp_path / "x.safetensors"), "--dtype", "float16"]) == 0
    assert "SD 1.x in " in capsys.readouterr().out
    assert set(open_checkpoint(tmp_path / "x.safetensors").parts["vae"].dtypes()) == {"float16"}
    assert main(["info", str(tmp_path)]) == 1
    assert "did you mean the file x.safetensors in it?" in capsys.readouterr().err
