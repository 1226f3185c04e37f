"""The page of `posttrain inspect` as a browser would take it apart, for the tests."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """The elements, their attributes, and the text of each token."""

    def __init__(self, file):
        super().__init__()
        self.tags, self.attributes, self.text, self.tokens, self.inside = [], [], "", [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.inside.append((tag, dict(attrs)))
        if tag == "span" and "t " in (dict(attrs).get("class") or "") + " ":
            self.tokens.append({"class": dict(attrs)["class"].split(), "b": "", "small": ""})

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop()[0] != tag:
            pass

    def handle_data(self, data):
        tag = self.inside[-1][0] if self.inside else ""
        if tag != "style":
            self.text += data
        if tag in ("b", "small") and self.tokens and len(self.inside) > 1 and self.inside[-2][0] == "span":
            self.tokens[-1][tag] += data
