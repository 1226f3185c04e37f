"""Short texts in ten languages and six domains, to hold tokenizers against each other.

In: nothing. Out: LANGUAGES, the same five sentences in each, so that token counts compare what the same content costs
in two languages (Petrov et al. 2023, arXiv 2305.15425); DOMAINS, text that is no prose. Written for this file and in
the public domain (CC0 1.0). They are far too short to say much of a tokenizer alone; held-out rows are for that.
"""

LANGUAGES = {
    "English": (
        "This morning the baker opened her shop before sunrise. She had already kneaded the dough, and the smell of "
        "warm bread drifted down the street. A boy came in and asked for two rolls, but he had forgotten his money. "
        "She smiled and told him to pay tomorrow. He thanked her, ran home through the rain and gave one of the rolls "
        "to his little sister."
    ),
    "German": (
        "Heute Morgen öffnete die Bäckerin ihren Laden noch vor Sonnenaufgang. Den Teig hatte sie schon geknetet, und "
        "der Duft von warmem Brot zog die Straße hinunter. Ein Junge kam herein und wollte zwei Brötchen, aber er "
        "hatte sein Geld vergessen. Sie lächelte und sagte, er könne morgen bezahlen. Er bedankte sich, lief durch "
        "den Regen nach Hause und gab eines der Brötchen seiner kleinen Schwester."
    ),
    "French": (
        "Ce matin, la boulangère a ouvert sa boutique avant le lever du soleil. Elle avait déjà pétri la pâte, et "
        "l'odeur du pain chaud descendait la rue. Un garçon est entré et a demandé deux petits pains, mais il avait "
        "oublié son argent. Elle a souri et lui a dit de payer demain. Il l'a remerciée, a couru chez lui sous la "
        "pluie et a donné l'un des petits pains à sa petite sœur."
    ),
    "Spanish": (
        "Esta mañana la panadera abrió su tienda antes del amanecer. Ya había amasado la masa, y el olor a pan "
        "caliente bajaba por la calle. Un niño entró y pidió dos panecillos, pero había olvidado el dinero. Ella "
        "sonrió y le dijo que pagara mañana. Él le dio las gracias, corrió a casa bajo la lluvia y le dio uno de los "
        "panecillos a su hermanita."
    ),
    "Russian": (
        "Сегодня утром булочница открыла свою лавку ещё до восхода солнца. Тесто она уже замесила, и запах тёплого "
        "хлеба разносился по улице. Вошёл мальчик и попросил две булочки, но он забыл деньги. Она улыбнулась и "
        "сказала, что заплатить можно завтра. Он поблагодарил её, побежал домой под дождём и отдал одну булочку "
        "младшей сестре."
    ),
    "Chinese": (
        "今天早上，面包师在日出之前就开了店门。面团她早已和好，热面包的香味飘满了整条街。"
        "一个男孩走进来，要买两个小面包，可是他忘了带钱。她笑了笑，让他明天再付。"
        "男孩道了谢，冒着雨跑回家，把其中一个小面包给了妹妹。"
    ),
    "Japanese": (
        "今朝、パン屋の女主人は日の出前に店を開けた。生地はもうこね終わっていて、"
        "焼きたてのパンの香りが通りに漂っていた。男の子が入ってきて丸パンを二つ頼んだが、お金を忘れていた。"
        "彼女は微笑んで、明日払えばいいと言った。男の子はお礼を言い、雨の中を家まで走り、"
        "丸パンの一つを妹にあげた。"
    ),
    "Korean": (
        "오늘 아침 빵집 주인은 해가 뜨기 전에 가게 문을 열었다. 반죽은 이미 해 두었고, "
        "따뜻한 빵 냄새가 거리를 따라 퍼졌다. 한 소년이 들어와 작은 빵 두 개를 달라고 했지만 돈을 두고 왔다. "
        "그녀는 웃으며 내일 내도 된다고 말했다. 소년은 고맙다고 인사하고 빗속을 달려 집으로 가서 "
        "빵 하나를 여동생에게 주었다."
    ),
    "Arabic": (
        "فتحت الخبازة متجرها هذا الصباح قبل شروق الشمس. كانت قد عجنت العجين، وانتشرت رائحة الخبز الدافئ في الشارع. "
        "دخل ولد وطلب رغيفين صغيرين، لكنه كان قد نسي نقوده. ابتسمت وقالت له أن يدفع غدًا. "
        "شكرها وركض إلى البيت تحت المطر، وأعطى أحد الرغيفين لأخته الصغيرة."
    ),
    "Hindi": (
        "आज सुबह बेकरी वाली ने सूरज निकलने से पहले ही अपनी दुकान खोल ली। वह आटा पहले ही गूँध चुकी थी, "
        "और गरम रोटी की खुशबू गली में फैल रही थी। एक लड़का अंदर आया और उसने दो छोटी रोटियाँ माँगीं, "
        "लेकिन वह अपने पैसे भूल गया था। वह मुस्कुराई और बोली कि कल दे देना। उसने धन्यवाद कहा, "
        "बारिश में दौड़ता हुआ घर गया और एक रोटी अपनी छोटी बहन को दे दी।"
    ),
}

DOMAINS = {
    "Python": '''def longest_run(values):
    """Length of the longest run of equal neighbours."""
    best, current = 0, 0
    for index, value in enumerate(values):
        if index > 0 and value == values[index - 1]:
            current += 1
        else:
            current = 1
        best = max(best, current)
    return best


class Basket:
    def __init__(self, items=None):
        self.items = dict(items or {})

    def add(self, name, count=1):
        self.items[name] = self.items.get(name, 0) + count
''',
    "JSON": """{
  "order": {"id": 48213, "placed": "2024-03-09T07:41:55Z", "currency": "EUR"},
  "customer": {"name": "A. Example", "email": "a@example.org", "newsletter": false},
  "lines": [
    {"sku": "roll-plain", "quantity": 2, "unit_price": 0.45, "tax": 0.07},
    {"sku": "bread-rye-750", "quantity": 1, "unit_price": 4.2, "tax": 0.07}
  ],
  "note": null
}
""",
    "Markdown": """# Opening hours

| day | from | to |
|---|---|---|
| Monday | 06:00 | 13:00 |
| Saturday | 06:30 | 12:00 |

- **Rolls** are baked twice a day.
- On [holidays](https://example.org/holidays) the shop is *closed*.

> Ask for yesterday's bread: it is half the price.
""",
    "LaTeX": r"""Let $f(x) = x^3 - 3x$. Then $f'(x) = 3x^2 - 3 = 3(x - 1)(x + 1)$, so that
\begin{equation}
  \int_{-1}^{2} f(x)\,\mathrm{d}x = \left[ \frac{x^4}{4} - \frac{3x^2}{2} \right]_{-1}^{2}
  = (4 - 6) - \left( \tfrac{1}{4} - \tfrac{3}{2} \right) = -\frac{3}{4}.
\end{equation}
The mean over $[-1, 2]$ is $-\tfrac{1}{4}$, and $\sum_{k=1}^{n} k = \frac{n(n+1)}{2}$.
""",
    "arithmetic": """17 + 25 = 42
384 - 129 = 255
56 * 78 = 4368
1000 / 8 = 125
3.14159 * 2.5 = 7.853975
(12 + 30) * (7 - 4) = 126
2048 + 4096 + 8192 = 14336
99999 + 1 = 100000
""",
    "chat": """hey, are u coming 2nite?? 😀
yesss 🎉🎉 just finishing work... be there @ 8ish
gr8! can u bring drinks 🍹 + the charger pls
sure thing 👍 lol mine's broken 😭 borrowing Sam's
omg same 😂 c u soon xx
""",
}
