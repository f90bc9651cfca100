"""The site's pages in headless Chromium: legible, no wider than the window, self-contained.

Home, all pages and experiments, and every fourth chapter are measured at the width of a desktop and
of a phone, in light and in dark, with all that is folded opened.
"""

import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
if not CHROMIUM:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("smalldocs")

OFFLINE = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
DESKTOP = ("light", 1280)
VIEWS = (DESKTOP, ("dark", 1280), ("dark", 390))
FIRST_LOAD = 1_500_000  # bytes

MEASURE = """() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const parse = text => {
    const n = (text.match(/-?[\\d.]+(?:e-?\\d+)?/g) || []).map(Number);
    if (text.startsWith('color(srgb')) return [n[0] * 255, n[1] * 255, n[2] * 255, n[3] ?? 1];
    return [n[0], n[1], n[2], n[3] ?? 1];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)];
    return (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
  };
  const layers = new Map([[null, {seen: 1, behind: [255, 255, 255]}]]);
  const layer = el => {
    if (layers.has(el)) return layers.get(el);
    const {seen, behind} = layer(el.parentElement), style = getComputedStyle(el);
    const own = {seen: seen * style.opacity, text: parse(style.color)};
    const [r, g, b, alpha] = parse(style.backgroundColor);
    own.behind = over([r, g, b, alpha * own.seen], behind);
    own.text[3] *= own.seen;
    const size = parseFloat(style.fontSize);
    own.large = size >= 24 || size >= 18.66 && style.fontWeight >= 700;
    own.contrast = contrast(over(own.text, own.behind), own.behind);
    layers.set(el, own);
    return own;
  };
  const name = el => el.tagName.toLowerCase() + (el.className ? '.' + el.className : '');
  const faint = new Map();
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const how = {checkOpacity: true, checkVisibilityCSS: true};
  while (walk.nextNode()) {
    const node = walk.currentNode, el = node.parentElement;
    if (!node.data.trim() || !el.checkVisibility(how) || el.closest('math annotation')) continue;
    const {contrast, large} = layer(el);
    if (contrast < (large ? 3 : 4.5) - .005)
      faint.set(name(el), `${contrast.toFixed(2)}: ${node.data.trim().slice(0, 40)}`);
  }
  for (const el of document.querySelectorAll('input[placeholder]')) {
    if (!el.checkVisibility(how)) continue;
    const {behind} = layer(el), text = parse(getComputedStyle(el, '::placeholder').color);
    const ratio = contrast(over(text, behind), behind);
    if (ratio < 4.5) faint.set(name(el), `${ratio.toFixed(2)}: ${el.placeholder}`);
  }
  const wide = window.innerWidth, cut = new Set();
  for (const el of document.querySelectorAll('#quarto-content main *')) {
    if (!el.checkVisibility() || el.getBoundingClientRect().right <= wide + 1) continue;
    let inside = false;
    for (let e = el; e && e.tagName != 'MAIN'; e = e.parentElement)
      inside ||= ['auto', 'scroll', 'hidden'].includes(getComputedStyle(e).overflowX);
    if (!inside) cut.add(name(el));
  }
  const code = [...document.querySelectorAll('pre')].filter(p => p.checkVisibility());
  return {
    faint: [...faint].map(([el, what]) => `${el} ${what}`),
    overflow: document.documentElement.scrollWidth - wide,
    cut: [...cut],
    code: code.length,
    scrolls: code.filter(p => p.scrollWidth > p.clientWidth + 1).length,
  };
}"""

# A page of the book says which theme it has; the explorer, which is no such page, has but CSS.
THEMED = """dark => !document.querySelector('#quarto-content')
  || document.documentElement.classList.contains('quarto-dark') === dark"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=OFFLINE)
        yield browser
        browser.close()


class Visits:
    "Pages opened in a window, measured in light and dark, as wide as a desktop and as a phone."

    def __init__(self, browser):
        self.page = browser.new_context(reduced_motion="reduce").new_page()
        self.errors, self.asked = [], []
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(m.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def measured(self, scheme: str, width: int) -> dict:
        self.page.emulate_media(color_scheme=scheme)
        self.page.set_viewport_size(dict(width=width, height=900))
        self.page.wait_for_function(THEMED, arg=scheme == "dark")
        return self.page.evaluate(MEASURE)

    def visit(self, path) -> dict:
        self.errors.clear()
        self.asked.clear()
        self.page.emulate_media(color_scheme="light")
        self.page.goto(path.as_uri())
        found = {view: self.measured(*view) for view in VIEWS}
        return found | dict(errors=list(self.errors), asked=set(self.asked))


@pytest.fixture(scope="module")
def seen(site, chromium) -> dict:
    "What was measured, by page."
    visits, every = Visits(chromium), sorted(site.rglob("*.html"))
    chapters = [p for p in every if p.parent.name == "nbs"]
    chosen = [p for p in every if p not in chapters] + chapters[::4]
    return {str(p.relative_to(site)): visits.visit(p) for p in chosen}


def everywhere(seen: dict, what: str, views=None) -> dict:
    "What was measured of every page, in every view."
    return {
        (page, *view): found[view][what] for page, found in seen.items() for view in views or VIEWS
    }


def test_all_text_is_legible(seen):
    faint = {key: found for key, found in everywhere(seen, "faint").items() if found}
    assert not faint


def test_no_page_is_wider_than_its_window(seen):
    assert not {key: by for key, by in everywhere(seen, "overflow").items() if by > 0}
    assert not {key: cut for key, cut in everywhere(seen, "cut").items() if cut}


def test_code_fits_its_column(seen):
    "On a desktop; on a phone it scrolls."
    code = sum(everywhere(seen, "code", [DESKTOP]).values())
    scrolls = sum(everywhere(seen, "scrolls", [DESKTOP]).values())
    assert code > 500 and scrolls <= 0.02 * code, (scrolls, code)


def test_no_page_has_errors(seen):
    assert not {key: found["errors"] for key, found in seen.items() if found["errors"]}


def test_no_page_asks_a_network(seen):
    asked = {url for found in seen.values() for url in found["asked"]}
    assert asked and {urlsplit(url).scheme for url in asked} <= {"file", "data"}


def test_pages_are_light(seen):
    "What a reader fetches who opens a page as the first one, of each figure one of two pictures."
    for name, found in seen.items():
        files = {unquote(urlsplit(u).path) for u in found["asked"] if u.startswith("file:")}
        narrow = {path for path in files if path.endswith(".phone.png")}
        wide = {path.replace(".phone.png", ".png") for path in narrow}
        for fetched in (files - narrow, files - wide):
            size = sum(Path(path).stat().st_size for path in fetched)
            assert 0 < size <= FIRST_LOAD, (name, size)
