"""The page /kt in a real browser: figures, map, key, hostile names, a phone, dark colours."""

from __future__ import annotations

import asyncio
import functools
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from browser import Tab, chromium, open_tab
from PIL import Image
from status_figures import HOSTILE, KEY, REPORT, Manager, application, later

from kt_kernel.integrations.sglang.status import routes

PROGRAM = chromium()
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="there is no Chromium; on Debian: apt-get install chromium"
)


@pytest.fixture(autouse=True)
def hooked(monkeypatch):
    from sglang.srt.utils import auth

    around = functools.partial(routes.open_page, auth.decide_request_auth)
    monkeypatch.setattr(auth, "decide_request_auth", around)


@contextmanager
def served(manager: Manager, key: str | None = None) -> Iterator[str]:
    """The page's address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(application(manager, key), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline, "the page's server does not start"
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/kt"
        finally:
            server.should_exit = True
            thread.join()


def shown(look, manager: Manager, key: str | None = None):
    """What `look(tab)` returns, of the page in a browser."""

    async def run(url: str):
        async with open_tab(PROGRAM, url) as tab:
            return await look(tab)

    with served(manager, key) as url:
        return asyncio.run(run(url))


async def text_of(tab: Tab, element: str) -> str:
    return await tab.evaluate(f"document.getElementById('{element}').innerText")


def test_figures_between_two_readings_are_rates_and_the_map_shows_the_placement():
    async def look(tab: Tab):
        await tab.until("rates.length > 0")
        table = await tab.evaluate(
            "[...$('layers').rows].map((row) => [...row.cells].map((cell) => cell.textContent))"
        )
        # The middle of each cell of the map's first row.
        colours = await tab.evaluate("""(() => {
            const { wide, high } = geometry(), pen = $('map').getContext('2d');
            return [...Array(8).keys()].map((expert) => [...pen.getImageData(
                LABEL + (expert + 0.5) * wide, high / 2, 1, 1).data].slice(0, 3)); })()""")
        await tab.evaluate(
            "document.getElementById('map').dispatchEvent(new PointerEvent('pointerdown', "
            "{ clientX: $('map').getBoundingClientRect().left + LABEL + 2.5 * geometry().wide, "
            "clientY: $('map').getBoundingClientRect().top + 3 }))"
        )
        return await text_of(tab, "tiles"), table, colours, await text_of(tab, "cell")

    tiles, table, colours, cell = shown(look, Manager(REPORT, later()))
    for figure in (
        "20.0",  # 40 tokens in 2 s
        "540 so far; 2 running, 1 waiting",
        "found 1,000 of 4,000 tokens of prompts",
        "25.0 %",  # 1000 of 4000 tokens of prompts were in the cache; half a second of two
        "20.0 GB/s",
        "limit 40.0 GB/s, as measured",
        "50.0 %",
        "18.0 GB",
        "of 24.0 GB; the model's process 9.0 GB",
        "A GPU: 12.0 GB of 24.0 GB",
        "3 of 16 are there; 5 moved",
    ):
        assert figure in tiles, figure
    assert table[1] == ["1", "3/3", "75.0 %", "400", "2 (150), 0 (100), 4 (100)", "0 2 3"]
    blue = [red < blue for red, _, blue in colours]
    assert blue == [expert in (0, 2, 3) for expert in range(8)]
    paleness = [sum(colour) for colour in colours]
    assert paleness[2] < paleness[0] < paleness[3]  # on the device: 150, 100 and 50 uses
    assert paleness[4] < paleness[1] == paleness[5]  # on the CPU: 100, none, none
    assert cell == "Layer 1, expert 2: on the device, used 150 times, 3.00 times the layer's average"


def test_names_are_text_whatever_is_in_them():
    report = later()
    report["machine"]["cpu"] = report["method"] = HOSTILE
    report["memory"][0] |= {"what": HOSTILE, "where": HOSTILE}
    report["machine"]["gpus"][0]["name"] = HOSTILE

    async def look(tab: Tab):
        await tab.until("!$('main').hidden")
        images = await tab.evaluate("document.querySelectorAll('img').length")
        texts = [await text_of(tab, element) for element in ("model", "about", "memory", "tiles")]
        return await tab.evaluate("document.title"), images, texts

    title, images, texts = shown(look, Manager(report, model=HOSTILE))
    assert title == f"{HOSTILE} – kt-kernel" and images == 0
    assert all(HOSTILE in text for text in texts)


def test_the_page_asks_for_the_key_refuses_a_wrong_one_and_keeps_the_right_one_in_the_tab():
    give = "$('secret').value = '{}'; $('ask').requestSubmit()"

    async def look(tab: Tab):
        await tab.until("!$('ask').hidden")
        hidden = await tab.evaluate("$('main').hidden")
        await tab.evaluate(give.format("wrong"))
        await tab.until("$('trouble').textContent.includes('refuses this key')")
        await tab.evaluate(give.format(KEY))
        await tab.until("!$('main').hidden")
        await tab.evaluate("window.before = 1")
        await tab.call("Page.reload")
        await tab.until("!window.before && document.readyState === 'complete' && !$('main').hidden")
        return hidden, await text_of(tab, "model"), await tab.evaluate("localStorage.length")

    assert shown(look, Manager(REPORT), KEY) == (True, "a model", 0)


def test_it_fits_a_phone_and_follows_the_preferred_colours():
    wide = later()
    wide["layers"] = [layer | {"expert_uses": [1] * 384, "device_experts": []} for layer in wide["layers"]]

    async def look(tab: Tab):
        widths, papers = [], []
        for scheme in ("light", "dark"):
            await tab.screen(360, 740, scheme)
            await tab.until("!$('main').hidden")
            widths.append(await tab.evaluate("document.documentElement.scrollWidth"))
            picture = Image.open(io.BytesIO(await tab.screenshot())).convert("RGB")
            papers.append(sum(picture.getpixel((2, 2))) / 3)
        return widths, papers

    widths, (light, dark) = shown(look, Manager(wide))
    assert max(widths) <= 360
    assert light > 200 and dark < 60


def test_a_server_that_stops_answering_is_said_and_the_last_figures_stay():
    manager = Manager(REPORT)

    async def look(tab: Tab):
        await tab.until("!$('main').hidden")
        part = await text_of(tab, "part")
        assert part == "Shown is the first of 4 replicas, of 2 ranks; /metrics has all."
        manager.reports = [None]
        await tab.until("$('trouble').textContent.startsWith('No figures: no scheduler of this server')")
        return await text_of(tab, "tiles")

    assert "500 so far" in shown(look, manager)
