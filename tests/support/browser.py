"""A headless browser for the tests, Chromium as Qt ships it: what a page looks like to one, as a line of JSON.

    python tests/support/browser.py PAGE WIDTH light|dark

Runs in a process of its own, since Qt and its threads do not go away.
"""

import json
import os
import sys

from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

_LOOK = """JSON.stringify({
  wide: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  headings: [...document.querySelectorAll('h1, h2')].map(one => one.textContent),
  drawings: [...document.querySelectorAll('svg')].map(one => one.getBoundingClientRect().width),
  letters: Math.min(...[...document.querySelectorAll('svg text')].map(one => one.getBoundingClientRect().height)),
})"""


class _Page(QWebEnginePage):
    def __init__(self, *above):
        super().__init__(*above)
        self.said = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.said.append(message)


class _Requests(QWebEngineUrlRequestInterceptor):
    def __init__(self):
        super().__init__()
        self.seen = []

    def interceptRequest(self, info):
        self.seen.append(info.requestUrl().toString())


def main(file: str, width: int, scheme: str) -> None:
    os.environ |= {
        "QT_QPA_PLATFORM": "offscreen",
        "QTWEBENGINE_DISABLE_SANDBOX": "1",  # the page is ours, and a container has no sandbox to give
        "QTWEBENGINE_CHROMIUM_FLAGS": f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}",
    }
    application = QApplication(["browser"])
    profile, requests = QWebEngineProfile(), _Requests()
    profile.setUrlRequestInterceptor(requests)
    view = QWebEngineView()
    page = _Page(profile, view)
    view.setPage(page)
    view.resize(width, 900)

    def show(found: str) -> None:
        print(json.dumps(json.loads(found) | {"console": page.said, "requests": requests.seen}))
        application.quit()

    page.loadFinished.connect(lambda loaded: QTimer.singleShot(300, lambda: page.runJavaScript(_LOOK, show)))
    page.load(QUrl.fromLocalFile(file))
    view.show()
    QTimer.singleShot(60_000, lambda: application.exit(1))
    sys.exit(application.exec())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
