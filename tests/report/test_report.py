"""The report: one self-contained page that shows every number, escapes every name and flatters no verdict."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import skimage.data
from scipy.ndimage import gaussian_filter

from edgedyn.errors import UsageError
from edgedyn.report import Picture, write_report
from edgedyn.report.rows import Row
from edgedyn.report.text import MINUS, TIMES

HOSTILE = '<script>alert("x")</script>'
MANIFEST = {"target": "executorch", "precision": "int8"}
ROWS = (
    Row("canonical:reference", "max_abs", 2.1e-13, {"at_most": 1e-12}, 6),
    Row("float:truth", "psnr_db[sigma=15]", 33.871, {}, 12),
    Row("float:truth", "psnr_db[sigma=25]", 31.313, {}, 12),
    Row("device:truth", "psnr_db[sigma=15]", 33.701, {"at_least": 33.6}, 12),
    Row("device:truth", "psnr_db[sigma=25]", 31.231, {"at_least": 31.2}, 12),
    Row("canonical:reference", "sqnr_db", math.inf, {"at_least": 200}, 6),
)
FAILED = Row("device:truth", "ssim", math.nan, {"at_least": 0.87}, 12)


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and the text of each row of a table."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.rows, self.text, self.in_cell = [], [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("th", "td")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def cells(self, metric):
        """Return the cells of the rows of that metric, spaces joined."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows if row]
        return [row for row in rows if row[0].split()[0] == metric]

    def images(self):
        return [attrs["src"] for tag, attrs in self.tags if tag == "img"]


def write(folder, *, ok=True, rows=ROWS, title="MalleNet-S", manifest=MANIFEST, pictures=(), facts=None):
    write_report(
        folder,
        title=title,
        ok=ok,
        rows=[row.to_json() for row in rows],
        manifest=manifest,
        pictures=list(pictures),
        facts=facts or {},
    )
    return (folder / "report.html").read_text(encoding="utf-8")


def picture_of(image, *, sigma=25.0):
    """Return a picture with real noise; a Gaussian filter and rounding stand in for network and INT8."""
    truth = (image / 255).astype(np.float32)
    noise = np.random.default_rng(0).normal(0, sigma / 255, truth.shape)
    noisy = (truth + noise).astype(np.float32)
    filtered = gaussian_filter(noisy, (1, 1, 0))
    rounded = (np.rint(filtered * 127) / 127).astype(np.float32)
    return Picture("a place", sigma, noisy, filtered, rounded, truth)


def flat_picture(*, noisy=0.5, float_=0.5, device=0.5, truth=0.5, shape=(6, 10, 3)):
    return Picture("flat", 25, *(np.full(shape, v, np.float32) for v in (noisy, float_, device, truth)))


def test_three_real_picture_sets_of_256_stay_under_3_megabytes(tmp_path):
    images = (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea())
    html = write(tmp_path, pictures=[picture_of(image[20:276, 100:356]) for image in images])
    assert len(Page(html).images()) == 12
    assert len(html.encode()) < 3_000_000


def test_nothing_is_loaded_and_nothing_is_executed(tmp_path):
    html = write(tmp_path, pictures=[flat_picture()])
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    for tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs), tag
        assert not {"href", "srcset", "action", "data", "background"} & set(attrs), tag
    assert all(uri.startswith("data:image/png;base64,") for uri in page.images())
    assert not re.search(r"url\(|@import|https?:", html)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_every_text_that_comes_from_outside_is_escaped(tmp_path):
    row = Row(HOSTILE, f"{HOSTILE}[{HOSTILE}]", 1.0, {"at_least": 0.0}, 1)
    bad = Row(HOSTILE + "2", HOSTILE, math.nan, {}, 1)
    flat = flat_picture()
    picture = Picture(f'"{HOSTILE}', 25, flat.noisy, flat.float_, flat.device, flat.truth)
    hostile = {HOSTILE: HOSTILE}
    spec = {"name": HOSTILE, "dtype": HOSTILE, "shape": (1, 3), "meaning": HOSTILE}
    manifest = {"target": HOSTILE, "precision": HOSTILE}
    manifest |= {"forms": hostile, "versions": hostile, "digests": hostile}
    manifest |= {"inputs": [spec], "digests": {HOSTILE: HOSTILE}}
    facts = {"programs": {HOSTILE: 1}, "calibration": hostile, "check_build": hostile, HOSTILE: [HOSTILE]}
    facts |= {"float_nodes": [{"node": HOSTILE, "reason": HOSTILE}]}
    html = write(
        tmp_path, ok=False, rows=(row, bad), title=HOSTILE, manifest=manifest, pictures=[picture], facts=facts
    )
    assert "<script" not in html.lower()
    assert html.lower().count("&lt;script&gt;") >= 30  # each of the places above says it at least once
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all(set(attrs) == {"src", "alt"} for tag, attrs in page.tags if tag == "img")


def test_the_verdict_is_a_word_a_sign_and_a_sentence(tmp_path):
    html = write(tmp_path)
    assert '<span class="mark passed">✓ Passed</span>' in html
    assert "All 4 checks hold. 2 more numbers are reported only." in html
    assert "<title>MalleNet-S: passed</title>" in html
    assert "executorch, INT8" in html


def test_a_failed_report_names_the_failed_rows_at_the_top(tmp_path):
    html = write(tmp_path, ok=False, rows=(*ROWS, FAILED))
    assert '<span class="mark failed">✗ Failed</span>' in html
    assert "1 of 5 checks do not hold." in html
    top = " ".join(unescape(html[html.index('class="failures"') : html.index("</ul>")]).split())
    assert "device:truth: <code>ssim</code> is not a number, limit ≥ 0.87, samples 12" in top
    assert top.count("<li>") == 1


def test_a_failure_outside_the_rows_is_said(tmp_path):
    assert "the build failed for a reason outside this table" in write(tmp_path, ok=False)


def test_nothing_compared_is_said(tmp_path):
    assert "Nothing was compared" in write(tmp_path, ok=False, rows=())


@pytest.mark.parametrize("rows", [(), (*ROWS, FAILED)], ids=["no rows", "a failed row"])
def test_a_verdict_that_the_rows_contradict_is_refused(rows, tmp_path):
    with pytest.raises(UsageError, match=r"is to say 'passed', but \d of \d rows passed"):
        write(tmp_path, rows=rows)
    assert not list(tmp_path.iterdir())


def test_each_row_shows_value_unit_limit_samples_and_a_word(tmp_path):
    page = Page(write(tmp_path, ok=False, rows=(*ROWS, FAILED)))
    assert page.cells("max_abs") == [["max_abs", f"2.1e{MINUS}13", f"≤ 1e{MINUS}12", "6", "✓ passed"]]
    assert page.cells("sqnr_db") == [["sqnr_db", "∞ dB", "≥ 200", "6", "✓ passed"]]
    assert page.cells("ssim") == [["ssim", "not a number", "≥ 0.87", "12", "✗ failed"]]
    assert page.cells("psnr_db") == [
        ["psnr_db sigma=15", "33.87 dB", "", "12", "· reported"],
        ["psnr_db sigma=25", "31.31 dB", "", "12", "· reported"],
        ["psnr_db sigma=15", "33.70 dB", "≥ 33.6", "12", "✓ passed"],
        ["psnr_db sigma=25", "31.23 dB", "≥ 31.2", "12", "✓ passed"],
    ]


def test_a_failed_value_is_not_rounded_onto_its_limit(tmp_path):
    row = Row("device:truth", "psnr_db", 31.199999, {"at_least": 31.2}, 12)
    assert Page(write(tmp_path, ok=False, rows=(row,))).cells("psnr_db")[0][1] == "31.199999 dB"


def test_a_row_that_was_read_back_from_json_as_text_is_shown(tmp_path):
    row = {**ROWS[0].to_json(), "value": "inf", "passed": False}
    write_report(tmp_path, title="t", ok=False, rows=[row], manifest=MANIFEST, pictures=[], facts={})
    assert "∞" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_rows_are_grouped_by_what_they_compare_each_group_once(tmp_path):
    html = write(tmp_path)
    groups = re.findall(r'<code class="quiet">([^<]*)</code></h3>', html)
    assert groups == ["canonical:reference", "float:truth", "device:truth"]
    assert "Is the rewrite of the dynamic layers exact?" in html


def test_an_unknown_comparison_is_shown_by_its_name(tmp_path):
    row = Row("tensorrt:parse", "refused_nodes", 0, {"at_most": 0}, 412)
    html = write(tmp_path, rows=(row,))
    assert "<h3>tensorrt:parse</h3>" in html
    assert Page(html).cells("refused_nodes") == [["refused_nodes", "0", "≤ 0", "412", "✓ passed"]]


def test_quality_lost_is_the_worst_drop_among_conditions_measured_on_both(tmp_path):
    html = write(tmp_path)
    assert "<dt>Quality lost</dt><dd>0.17 dB</dd><dd>PSNR 33.87 → 33.70 dB, at worst: sigma=15</dd>" in html
    assert "Quality lost" not in write(tmp_path, rows=ROWS[:3])


def test_facts_are_shown_where_given_and_only_there(tmp_path):
    facts = {
        "programs": {"model.pte": 1_000_000, "router.pte": 23_456},
        "latency_ms": {"median": 78.913, "p95": 84.2, "runs": 50},
        "int8_mac_share": 0.9342,
        "float_nodes": [
            {"node": "tail", "reason": "last tensor"},
            {"node": "levels.0", "reason": "generated kernels"},
            {"node": "levels.1", "reason": "generated kernels"},
        ],
        "check_build": {"scratch": "335 MB", "refused": 0, "ok": True},
        "calibration": {"set": "denoise-16", "images": 16, "noise": "sigma 25", "engine": "nncf"},
        "generated_kernels": {"levels.0.output": {"spread": 0.614, "between_images": 0.2}},
        "delegated_nodes": 37,
    }
    text = " ".join(Page(write(tmp_path, facts=facts)).text.split())
    for said in (
        "Size 1.02 MB model.pte, router.pte",
        "Latency 78.91 ms median of 50 runs; p95 84.2 ms",
        "93.4 % of the convolutions' multiply-adds run in INT8.",
        "INT8 and float",
        "Float layers, and the reason",
        "last tensor 1 node: tail",
        "generated kernels 2 nodes: levels.0 , levels.1",
        "Check build with TensorRT ok yes refused 0 scratch 335 MB",
        "Calibration engine nncf images 16 noise sigma 25 set denoise-16",
        "Generated kernels, their deviation from the mean kernel "
        "levels.0.output 61% of its rms; 20% from image to image",
        "Further facts delegated_nodes 37",
    ):
        assert said.replace(" , ", ", ").replace(" ", "") in text.replace(" ", ""), said
    bare = write(tmp_path)
    for heading in (
        "Size",
        "Latency",
        "INT8 and float</h2>",
        "Float layers, and the reason",
        "Check build",
        "Calibration",
        "Generated",
        "Further",
    ):
        assert heading not in bare, heading


def test_the_manifest_is_shown(tmp_path):
    spec = {"name": "x", "dtype": "float32", "shape": [1, 3, 64, 96], "meaning": "noisy"}
    shape = TIMES.join(["1", "3", "64", "96"])
    manifest = {
        **MANIFEST,
        "inputs": [spec],
        "outputs": [{**spec, "name": "y", "meaning": "clean"}],
        "forms": {"sliced_depthwise2d": "resize_shift_mac"},
        "versions": {"torch": "2.13.0"},
        "digests": {"recipe": "9f" * 32},
    }
    text = Page(write(tmp_path, manifest=manifest)).text.replace("\n", "").replace(" ", "")
    for said in (
        f"input x float32, {shape}; noisy",
        f"output y float32, {shape}; clean",
        "sliced_depthwise2d resize_shift_mac",
        "torch 2.13.0",
        "recipe " + "9f" * 32,
    ):
        assert said.replace(" ", "") in text, said


def test_each_picture_set_is_a_row_with_its_captions(tmp_path):
    html = write(tmp_path, pictures=[flat_picture(noisy=0.6, float_=0.51, device=0.5)])
    assert "<b>Noisy</b><span>20.00 dB</span>" in html  # offsets of 0.1 and 0.01: 20 and 40 dB by definition
    assert "<b>Float</b><span>40.00 dB</span>" in html
    assert "<b>INT8</b><span>identical to the truth</span>" in html
    assert f"<b>Difference {TIMES} 10</b>" in html


def test_equal_arguments_give_equal_bytes(tmp_path):
    pictures = [picture_of(skimage.data.coffee()[:40, :50])]
    assert write(tmp_path, pictures=pictures) == write(tmp_path, pictures=pictures)


def test_a_picture_that_is_refused_leaves_no_page(tmp_path):
    with pytest.raises(UsageError, match="NaN"):
        write(tmp_path, pictures=[flat_picture(device=math.nan)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["target", "precision"])
def test_a_manifest_without_its_name_is_refused(key, tmp_path):
    with pytest.raises(UsageError, match=f"needs '{key}' in the manifest"):
        write(tmp_path, manifest={k: v for k, v in MANIFEST.items() if k != key})


def test_a_row_that_is_no_row_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"lacks \['between', 'limit', 'passed', 'samples', 'value'\]"):
        write_report(
            tmp_path, title="t", ok=False, rows=[{"metric": "x"}], manifest=MANIFEST, pictures=[], facts={}
        )


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        write(tmp_path / "nowhere")


def test_the_page_serves_dark_light_narrow_and_paper(tmp_path):
    html = write(tmp_path)
    assert {"prefers-color-scheme: dark", "max-width: 620px"} <= set(re.findall(r"@media \(([^)]*)\)", html))
    assert "@media print" in html
    assert 'name="viewport"' in html


def luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "ground"),
    [
        ("text", "page"),
        ("quiet", "page"),
        ("good", "page"),
        ("bad", "page"),
        ("good", "good-wash"),
        ("bad", "bad-wash"),
        ("text", "bad-wash"),
    ],
)
def test_text_has_the_contrast_of_wcag_aa(scheme, text, ground, tmp_path):
    block = re.findall(r":root \{(.*?)\}", write(tmp_path), re.DOTALL)[scheme]
    colors = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    low, high = sorted((luminance(colors[text]), luminance(colors[ground])))
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.1, 1.4.3


def test_import_needs_neither_torch_nor_jinja_nor_pillow():
    code = "import sys, edgedyn.report; print(sorted({'torch', 'jinja2', 'PIL'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_control_characters_of_names_are_shown_escaped(tmp_path):
    page = write(tmp_path, title="net\x1b[31m\u202e", facts={"calibration": {"name": "set\x9b2J"}})
    assert not {"\x1b", "\u202e", "\x9b"} & set(page)
    assert "net\\x1b[31m\\u202e" in page
    assert "set\\x9b2J" in page
