"""What people read and type: search, advanced inputs, translations, and nodes called by their titles."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import re

import pytest

from ..helpers import ROOT

LOADERS = {"ZImageTransformerLoader", "ZImageTextEncoderLoader", "ZImageVAELoader"}
ADVANCED = {
    "weight_dtype", "repository", "compile", "cache_converted", "cache", "attention", "low_memory", "safe_retry",
    "cfg_normalization", "cfg_truncation", "network", "start", "fit", "on_negative", "left", "top", "right", "bottom",
}  # fmt: skip
# Chinese for Z-Image and for text to image, as escapes: checkers of node packs refuse tests with other letters
ZAOXIANG, WENSHENGTU = "\u9020\u76f8", "\u6587\u751f\u56fe"


@pytest.fixture(scope="module")
def infos(pack) -> dict[str, dict]:
    """node id -> what ComfyUI tells the browser of the node, without the order and the choices of its inputs."""
    extension = importlib.import_module("zimage_pack.nodes").ZImageExtension()
    found = {}
    for node in asyncio.run(extension.get_node_list()):
        info = vars(node.GET_SCHEMA().get_v1_info(node))
        inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
        found[info["name"]] = {**info, "inputs": {name: spec[1] for name, spec in inputs.items()}}
    assert len(found) == 11
    return found


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        *((name, "*") for name in ("zimage", "z-image", "z image", "zit", ZAOXIANG)),
        ("turbo", {"ZImageTransformerLoader", "ZImageSampler"}),
        (WENSHENGTU, {"ZImageTextEncode", "ZImageSampler"}),
        ("qwen", {"ZImageTextEncoderLoader", "ZImageTextEncode"}),
        ("gguf", {"ZImageTransformerLoader", "ZImageTextEncoderLoader"}),
        ("lora", {"ZImageLoraLoader"}),
        ("negative", {"ZImageTextEncode", "ZImageSampler"}),
        ("sampler", {"ZImageSampler"}),
        ("load", {*LOADERS, "ZImageLoraLoader"}),
    ],
)
def test_search_finds_the_nodes_that_are_meant_and_no_others(infos, typed, wanted):
    """The browser searches title, id and aliases (and more forgivingly)."""
    found = {
        name
        for name, info in infos.items()
        if any(typed in text.lower() for text in (info["display_name"], name, *info["search_aliases"]))
    }
    assert found == (infos.keys() if wanted == "*" else wanted)


def test_what_few_people_change_is_advanced(infos):
    for node, info in infos.items():
        marked = {name for name, options in info["inputs"].items() if options.get("advanced")}
        assert marked == ADVANCED & info["inputs"].keys(), node


def test_sentences_call_nodes_by_their_titles(infos):
    """Strings that hold more than a node's id, docstrings left out."""
    for path in [*ROOT.glob("nodes/**/*.py"), *ROOT.glob("zimage_core/**/*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(item.value) for item in ast.walk(tree) if isinstance(item, ast.Expr)}
        for item in ast.walk(tree):
            if isinstance(item, ast.Constant) and isinstance(item.value, str) and id(item) not in docstrings:
                named = [node for node in infos if re.search(rf"\b{node}\b", item.value) and node != item.value]
                assert not named, f"{path.name}, line {item.lineno}: {named} in {item.value!r}"


# Translations. English is in the nodes themselves: the browser takes it where it has no translation.

LANGUAGES = {
    path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("locales/*/nodeDefs.json")
}
CONTROL = "control_after_generate"  # a widget that the browser adds to seeds
SIGNS = re.compile(r"\d+(?:\.\d+)?|[A-Za-z]\w*(?:/\w+)+|\.[a-z]{3,}|\bauto\b", re.ASCII)


def test_there_is_chinese():
    assert "zh" in LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_translation_has_all_that_the_nodes_say(infos, language):
    said = LANGUAGES[language]
    assert said.keys() == infos.keys()
    for node, info in infos.items():
        told = said[node]
        assert told.keys() == {"display_name", "description", "inputs", "outputs"}
        control = {
            "control_after_generate" for options in info["inputs"].values() if options.get("control_after_generate")
        }
        assert told["inputs"].keys() == info["inputs"].keys() | control, node
        assert [*told["outputs"]] == [str(index) for index in range(len(info["output"]))], node
        for name, texts in {**told["inputs"], **told["outputs"]}.items():
            assert texts.keys() == ({"name"} if name in control else {"name", "tooltip"}), (node, name)


@pytest.mark.parametrize("language", LANGUAGES)
def test_translation_tells_the_same_numbers_paths_and_choices(infos, language):
    """In letters other than the English ones, and without what the browser's translator takes for a placeholder."""
    for node, info in infos.items():
        told = LANGUAGES[language][node]
        pairs = [(info["description"], told["description"])]
        pairs += [(options["tooltip"], told["inputs"][name]["tooltip"]) for name, options in info["inputs"].items()]
        pairs += [(tip, told["outputs"][str(index)]["tooltip"]) for index, tip in enumerate(info["output_tooltips"])]
        for english, other in pairs:
            assert {*SIGNS.findall(english)} == {*SIGNS.findall(other)}, (node, english, other)
            assert not english.isascii() or not other.isascii(), (node, other)
    for text in re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(LANGUAGES[language], ensure_ascii=False)):
        assert not set("@{}|") & set(text), text
