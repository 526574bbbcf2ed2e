"""extras/listen.py: the page's own JavaScript, run by V8, beside cif.py and the encoder.

What needs a browser is marked so, and not run by default:

    pip install playwright  # and a Chromium: the system's, or `playwright install chromium`
    python -m pytest -m browser tests/test_listen.py
"""

import base64
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from py_mini_racer import MiniRacer

from cif import cif
from extras import listen
from extras.listen import CREDITS, PROMPTS, TEMPLATE, Clip, chosen_prompts, frame, page, prompt
from ofa_encoder import (
    ALPHAS,
    COMPRESSIONS,
    PRESETS,
    SAMPLE_RATE,
    OFAEncoder,
    lam_from_period,
    lock_to_ends,
    modify_alpha,
    period_from_lam,
)

REPO = Path(__file__).parent.parent
CHECKPOINTS = {
    "regression": REPO / "checkpoints/ofa-tiny.pt",
    "segments": REPO / "checkpoints/segments-tiny.pt",
}
LAMS = [0, 0.37, 1, 1.6]
GRID = sorted({*LAMS, *(k / 50 for k in range(100)), 0.999, 1.001, 1.99})


def script(text, id) -> str:
    """What stands in the page's script element of that id."""
    return re.search(rf'<script[^>]* id="{id}">(.*?)</script>', text, re.DOTALL).group(1)


def data_of(text) -> dict:
    return json.loads(script(text, "data"))


@pytest.fixture(scope="module")
def js():
    """js(name, *arguments): call a function of the page's mathematics."""
    context = MiniRacer()
    context.eval(script(TEMPLATE.read_text(encoding="utf-8"), "cif"))
    context.eval("const encode = (utterance, lam, lock) => cif(weigh(utterance, lam, lock))")
    # Functions are no JSON, so rounding is chosen by a word.
    context.eval("const modify = (alpha, lam) => modify_alpha(alpha, lam, Math.fround)")

    def call(name, *arguments):
        words = ", ".join(json.dumps(argument) for argument in arguments)
        return json.loads(context.eval(f"JSON.stringify({name}({words}))"))

    return call


@pytest.fixture(scope="module", params=ALPHAS)
def made(request):
    """An encoder of each kind, the prompts, and the page that is made of them."""
    encoder = OFAEncoder.from_checkpoint(CHECKPOINTS[request.param])
    clips = chosen_prompts()
    return encoder, clips, page(encoder, clips)


def assert_same_fires(ours, fired):
    """ours: what the page's cif gave; fired: what cif.py did, for one utterance."""
    assert len(ours["fire_times"]) == fired.lengths.item()
    assert ours["fire_times"] == pytest.approx(fired.fire_times[0].tolist(), abs=1e-4)


# What the page computes.


@pytest.mark.parametrize("lam", LAMS)
def test_page_fires_as_the_encoder(made, js, lam):
    encoder, clips, text = made
    for clip, utterance in zip(clips, data_of(text)["utterances"]):
        with torch.no_grad():
            out = encoder(clip.waveform[None], lam=lam)
        assert_same_fires(js("encode", utterance, lam, True), out.fired)
        assert js("weigh", utterance, lam, True) == pytest.approx(out.fired.alpha[0].tolist())


def test_page_fires_as_the_encoder_on_a_fine_grid(made, js):
    encoder, clips, text = made
    for clip, utterance in zip(clips, data_of(text)["utterances"]):
        with torch.no_grad():
            x, frames = encoder.features(clip.waveform[None], torch.tensor([len(clip.waveform)]))
            for lam in GRID:
                weights = encoder.weigh(x, frames, lam)[2]
                assert_same_fires(js("encode", utterance, lam, True), cif(x, weights, frames))


def test_page_without_the_lock_fires_as_plain_cif(made, js):
    encoder, _, text = made
    dtype = torch.float64 if encoder.config.alpha == "segments" else torch.float32
    for utterance in data_of(text)["utterances"]:
        alpha = torch.tensor(utterance["alpha"], dtype=dtype)[None]
        for lam in GRID:
            weights = modify_alpha(alpha, lam)
            weights = weights * max(1, 0.501 / weights.sum())  # at least one token
            fired = cif(torch.zeros(*alpha.shape, 1), weights)
            assert_same_fires(js("encode", utterance, lam, False), fired)


# Eighths make running totals land exactly on token ends; free floats do not.
weights = st.lists(
    st.one_of(st.integers(0, 24).map(lambda n: n / 8), st.floats(1e-3, 3)), min_size=1, max_size=40
)


@given(alpha=weights)
def test_javascript_cif_is_cif(js, alpha):
    fired = cif(torch.zeros(1, len(alpha), 1), torch.tensor([alpha], dtype=torch.float64))
    assert_same_fires(js("cif", alpha), fired)


@given(alpha=weights, some=st.data())
def test_javascript_lock_is_the_lock(js, alpha, some):
    alpha[0] += 0.51  # the encoder sees to half a token before it locks
    ends = some.draw(st.lists(st.booleans(), min_size=len(alpha), max_size=len(alpha)))
    ends[-1] = True
    locked = lock_to_ends(torch.tensor([alpha], dtype=torch.float64), torch.tensor([ends]))
    assert js("lock_to_ends", alpha, ends) == pytest.approx(locked[0].tolist(), abs=1e-9)


@given(alpha=st.lists(st.floats(0, 1, width=32), min_size=1), lam=st.floats(0, 1.99))
def test_javascript_modifies_to_the_last_bit_of_float32(js, alpha, lam):
    assert js("modify", alpha, lam) == modify_alpha(torch.tensor(alpha), lam).tolist()


@given(period=st.floats(20, 1000), mean=st.floats(0.05, 0.95))
def test_javascript_has_the_closed_form(js, period, mean):
    lam = lam_from_period(period, mean)
    assert js("lam_from_period", period, mean) == pytest.approx(lam)
    assert js("period_from_lam", lam, mean) == pytest.approx(period_from_lam(lam, mean), rel=1e-4)


# What the page holds.


def test_sound_is_the_encoders_to_the_sample(made):
    _, clips, text = made
    for clip, utterance in zip(clips, data_of(text)["utterances"]):
        samples = np.frombuffer(base64.b64decode(utterance["pcm"]), "<i2") / 32768
        assert len(samples) == 320 * len(utterance["alpha"])
        np.testing.assert_array_equal(samples, clip.waveform[: len(samples)].numpy())


def test_spectrogram_has_two_columns_a_frame_and_one_more(made):
    for utterance in data_of(made[2])["utterances"]:
        image = read_image(utterance)
        assert image.shape == (80, 2 * len(utterance["alpha"]) + 1, 3)


def test_loud_high_sound_is_bright_at_the_top():
    time = torch.arange(SAMPLE_RATE) / SAMPLE_RATE
    waveform = 0.5 * torch.sin(2 * torch.pi * 6000 * time) * (time > 0.5)
    image = np.array(Image.open(io.BytesIO(listen.spectrogram(waveform))).convert("L"))
    row, column = np.unravel_index(image.argmax(), image.shape)
    assert row < 20 and column > 50


def test_ends_are_there_for_segments_alone(made):
    encoder, _, text = made
    for utterance in data_of(text)["utterances"]:
        if encoder.config.alpha == "segments":
            assert sum(utterance["ends"]) == pytest.approx(sum(utterance["alpha"]))
        else:
            assert utterance["ends"] is None


class Tags(HTMLParser):
    """All elements of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_page_asks_no_network_for_anything(made):
    text = made[2]
    links = set()
    for tag, attributes in Tags(text).tags:
        if tag == "a":
            links.add(attributes["href"])
        else:
            assert not attributes.keys() & {"src", "href", "srcset", "action", "poster", "data"}
    assert links == {listen.LICENCES[CREDITS[prompt[:2]][2]] for prompt in PROMPTS}
    for link in links:
        text = text.replace(f'<a href="{link}">', "")
    assert "://" not in text
    for word in (
        "fetch(",
        "import(",
        "@import",
        "XMLHttpRequest",
        "WebSocket",
        "EventSource",
        "sendBeacon",
    ):
        assert word not in text
    assert "url(" not in text
    assert "default-src 'none'" in text


def test_voices_are_credited(made):
    for language in ("English: Allison Smith", "French: June Wallack", "Italian: Carlo Flora"):
        assert language in made[2]


def test_words_of_a_recording_can_not_break_the_page():
    words = "a </script><b>& \"quoted\" 'words' <!-- __DATA__"
    encoder = OFAEncoder.from_checkpoint(CHECKPOINTS["regression"])
    text = page(encoder, [Clip(torch.zeros(SAMPLE_RATE), words)])
    assert data_of(text)["utterances"][0]["text"] == words
    assert "<b>" not in text


def test_frame_for_a_notebook_holds_the_page(made, asterisk):
    encoder, clips, _ = made
    text = frame(encoder, clips[:1])
    ((_, attributes),) = [tag for tag in Tags(text).tags if tag[0] == "iframe"]
    assert attributes["srcdoc"] == page(encoder, clips[:1], inline=True)
    assert len(text.encode()) < 300_000
    assert prompt(asterisk, 0).text == asterisk.utterances[0].text


def test_committed_page_is_what_the_command_makes(tmp_path, monkeypatch):
    """But for what another processor rounds differently: α, and shades of the spectrogram."""
    checkpoint = "checkpoints/segments-tiny.pt"
    monkeypatch.chdir(REPO)
    run(monkeypatch, checkpoint, tmp_path / "listen.html")
    new = (tmp_path / "listen.html").read_text(encoding="utf-8")
    old = (REPO / "docs/listen.html").read_text(encoding="utf-8")
    assert len(old) < 1_000_000
    assert old.replace(script(old, "data"), "") == new.replace(script(new, "data"), "")
    for before, after in zip(data_of(old)["utterances"], data_of(new)["utterances"], strict=True):
        assert before.pop("alpha") == pytest.approx(after.pop("alpha"), abs=1e-4)
        shades = read_image(before) - read_image(after)
        assert np.abs(shades).max() <= 8
        assert before | {"mel": ""} == after | {"mel": ""}


def read_image(utterance):
    """The spectrogram on the page: integers (rows, columns, 3)."""
    png = base64.b64decode(utterance["mel"].removeprefix("data:image/png;base64,"))
    return np.array(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


# The command.


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["listen.py", *map(str, arguments)])
    listen.main()


def test_page_of_own_recordings(tmp_path, monkeypatch):
    sound = 0.1 * np.random.default_rng(0).standard_normal((44_100, 2))
    soundfile.write(tmp_path / "a <b>.wav", sound, 44_100)
    run(monkeypatch, CHECKPOINTS["segments"], tmp_path / "new/page.html", tmp_path / "a <b>.wav")
    text = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    (utterance,) = data_of(text)["utterances"]
    assert utterance["text"] == "a <b>.wav"
    assert len(utterance["alpha"]) == 49  # a second
    assert "Asterisk" not in text


@pytest.mark.parametrize("compression", [c for c in COMPRESSIONS if c != "cif"])
def test_peer_of_one_rate_has_no_page(compression):
    encoder = OFAEncoder(replace(PRESETS["tiny"], compression=compression)).eval()
    with pytest.raises(ValueError, match="one fixed rate"):
        page(encoder, [Clip(torch.zeros(SAMPLE_RATE), "silence")])


def test_bad_input_is_named(tmp_path, monkeypatch):
    good = CHECKPOINTS["segments"]
    soundfile.write(tmp_path / "long.wav", np.zeros(int(20.3 * SAMPLE_RATE)), SAMPLE_RATE)
    (tmp_path / "text.wav").write_text("no sound")
    out = tmp_path / "page.html"
    with pytest.raises(ValueError, match="no checkpoint at nowhere.pt"):
        run(monkeypatch, "nowhere.pt", out)
    with pytest.raises(ValueError, match="long.wav: 20.30 s, expected at most 20"):
        run(monkeypatch, good, out, tmp_path / "long.wav")
    with pytest.raises(ValueError, match="text.wav"):
        run(monkeypatch, good, out, tmp_path / "text.wav")
    assert not out.exists()


def test_page_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch, unwritable):
    soundfile.write(tmp_path / "a.wav", np.zeros(SAMPLE_RATE), SAMPLE_RATE)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "page.html").write_text("old")
    monkeypatch.chdir(tmp_path)
    with unwritable(folder), pytest.raises(OSError, match="what was there before is intact"):
        run(monkeypatch, CHECKPOINTS["segments"], "folder/page.html", "a.wav")
    assert [path.name for path in folder.iterdir()] == ["page.html"]
    assert (folder / "page.html").read_text() == "old"


# In a browser.


@pytest.fixture(scope="module")
def chromium():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("the browser tests need playwright: see the top of tests/test_listen.py")
    with sync_playwright() as driver:
        # A system's own browser, or else the one that playwright has installed.
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, made, tmp_path):
    """opened(**options) is the page in a window of its own, without a network.

    At the end nothing may have been asked for but the page, and no error have been raised.
    """
    path = tmp_path / "page.html"
    path.write_text(made[2], encoding="utf-8")
    windows = []
    troubles = []
    requests = []

    def open_page(**options):
        window = chromium.new_context(offline=True, **options)
        windows.append(window)
        tab = window.new_page()
        tab.on("request", lambda request: requests.append(request.url))
        tab.on("pageerror", lambda error: troubles.append(str(error)))
        tab.on("console", lambda message: troubles.append(message.text))
        tab.goto(path.as_uri())
        return tab

    yield open_page
    for window in windows:
        window.close()
    assert troubles == []
    assert {url for url in requests if not url.startswith("data:")} == {path.as_uri()}


def until(tab, expression):
    """Wait until the expression is true. playwright's own wait_for_function evaluates text inside
    the page, which the page forbids."""
    for _ in range(600):
        if tab.evaluate(expression):
            return
        tab.wait_for_timeout(50)
    pytest.fail(f"{expression} has not come true")


def watch_lights(tab):
    """From now on `seen` lists the tokens that have been lit."""
    tab.evaluate(
        """() => {
            window.seen = [];
            const original = light;
            light = (t) => { if (t >= 0 && seen.at(-1) !== t) seen.push(t); original(t); };
        }"""
    )


def shown(tab) -> dict:
    names = ("lam", "ms", "tokens", "frames", "rate", "share")
    return {name: tab.inner_text(f"#n-{name}") for name in names}


def expected(encoder, waveform, lam) -> dict:
    with torch.no_grad():
        out = encoder(waveform[None], lam=lam)
    frames = out.frames.item()
    tokens = out.lengths.item()
    return {
        "lam": f"{lam:.2f}",
        "ms": f"{out.frame_period():.1f}",
        "tokens": str(tokens),
        "frames": str(frames),
        "rate": f"{tokens / (0.02 * frames):.1f}",
        "share": f"{100 * tokens / frames:.0f} %",
    }


@pytest.mark.browser
def test_slider_shows_the_encoders_numbers(opened, made):
    encoder, clips, _ = made
    tab = opened()
    for i, clip in enumerate(clips):
        tab.locator("#choices input").nth(i).check()
        for lam in LAMS:
            tab.locator("#slider").fill(str(lam))
            assert shown(tab) == expected(encoder, clip.waveform, lam)
            assert tab.locator("#tokens button").count() == int(shown(tab)["tokens"])
            assert float(tab.input_value("#lam")) == lam


@pytest.mark.browser
def test_fields_set_lam_and_refuse_what_is_none(opened, made):
    encoder, clips, _ = made
    tab = opened()
    tab.locator("#lam").fill("0.25")
    assert shown(tab) == expected(encoder, clips[0].waveform, 0.25)
    tab.locator("#ms").fill("60")
    assert shown(tab) == expected(encoder, clips[0].waveform, encoder.lam_for(60))
    before = shown(tab)
    for field, value in (("#lam", ""), ("#lam", "-1"), ("#ms", "3"), ("#ms", "")):
        tab.locator(field).fill(value)
        assert shown(tab) == before
    tab.locator("#lam").fill("7")
    assert shown(tab)["lam"] == "1.99"
    tab.locator("#slider").focus()
    until(tab, "document.querySelector('#lam').value === '1.99'")


@pytest.mark.browser
def test_lock_can_be_opened_where_there_is_one(opened, made):
    encoder, clips, _ = made
    tab = opened()
    assert tab.locator("#lock").is_visible() == (encoder.config.alpha == "segments")
    if encoder.config.alpha == "segments":
        tab.locator("#lam").fill("0.9")
        locked = tab.evaluate("fired.fire_times")
        tab.locator("#lock").uncheck()
        with torch.no_grad():
            alpha = encoder(clips[0].waveform[None]).alpha
        plain = cif(torch.zeros(*alpha.shape, 1), modify_alpha(alpha, 0.9))
        opened_times = tab.evaluate("fired.fire_times")
        assert opened_times == pytest.approx(plain.fire_times[0].tolist(), abs=1e-4)
        assert opened_times != pytest.approx(locked, abs=0.1)


@pytest.mark.browser
def test_keys_alone_do_everything(opened):
    tab = opened()
    tab.keyboard.press("Space")
    assert "Stop" in tab.inner_text("#play")
    tab.wait_for_selector("#tokens .lit")
    tab.keyboard.press("Space")
    assert "Play" in tab.inner_text("#play")

    tab.locator("#choices input").first.focus()
    tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    assert shown(tab)["lam"] == "1.01"
    tab.keyboard.press("Space")  # on the slider, too
    assert "Stop" in tab.inner_text("#play")
    tab.keyboard.press("Space")

    while not tab.evaluate("document.activeElement.closest('#tokens')"):
        tab.keyboard.press("Tab")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert "token 3 of" in tab.evaluate("document.activeElement.ariaLabel")
    watch_lights(tab)
    tab.keyboard.press("Enter")
    until(tab, "playing === null")
    assert tab.evaluate("seen") == [2]
    tab.keyboard.press("End")
    count = shown(tab)["tokens"]
    assert f"token {count} of {count}" in tab.evaluate("document.activeElement.ariaLabel")


@pytest.mark.browser
def test_token_that_is_pressed_is_heard_alone(opened):
    tab = opened()
    watch_lights(tab)
    tab.locator("#tokens button").nth(8).click()
    from_, to = tab.evaluate("[playing[0].from, playing[0].to]")
    assert [from_ / 0.02, to / 0.02] == pytest.approx(tab.evaluate("span(8)"))
    until(tab, "playing === null")
    assert tab.evaluate("seen") == [8]
    tab.locator("#apart").click()
    assert tab.evaluate("playing.length") == int(shown(tab)["tokens"])


@pytest.mark.browser
def test_tokens_light_up_one_after_the_other(opened):
    tab = opened()
    watch_lights(tab)
    tab.locator("#lam").fill("1.8")
    tab.locator("#play").click()
    until(tab, "playing === null")
    assert tab.evaluate("seen") == list(range(int(shown(tab)["tokens"])))


@pytest.mark.browser
@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_glides_where_little_motion_is_wished(opened, motion):
    tab = opened(reduced_motion=motion)
    tab.locator("#play").click()
    tab.wait_for_selector("#tokens .lit")
    assert tab.locator("#playhead").is_visible() == (motion == "no-preference")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_a_phone(opened, scheme):
    tab = opened(viewport={"width": 375, "height": 812}, color_scheme=scheme)
    for lam in LAMS:
        tab.locator("#lam").fill(str(lam))
        assert tab.evaluate("document.documentElement.scrollWidth") == 375
        beyond = """() => [...document.querySelectorAll("body *")]
            .filter((e) => e.checkVisibility() && !e.closest("#picture"))
            .filter((e) => e.getBoundingClientRect().right > 375.5)
            .map((e) => e.outerHTML.slice(0, 80))"""
        assert tab.evaluate(beyond) == []


@pytest.mark.browser
def test_frame_in_a_notebook_takes_the_height_of_its_page(chromium, made, tmp_path):
    encoder, clips, _ = made
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html>{frame(encoder, clips[:1])}", encoding="utf-8")
    window = chromium.new_context(offline=True)
    tab = window.new_page()
    tab.goto(path.as_uri())
    inside = tab.frame_locator("iframe")
    inside.locator("#slider").fill("0.37")
    assert (
        inside.locator("#n-tokens").inner_text()
        == expected(encoder, clips[0].waveform, 0.37)["tokens"]
    )
    height = inside.locator("html").evaluate("element => element.scrollHeight")
    assert abs(tab.locator("iframe").bounding_box()["height"] - height) < 20
    window.close()
