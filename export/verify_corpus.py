"""What a tokenizer or a chat template gets wrong first: hard strings and conversations.

Fixed on purpose: certificates of different days can be compared.
"""

Message = dict[str, str]

_WHITE_SPACE = (
    " |  |   |\t|\t\t|\n|\n\n|\n\n\n|\r\n| \n|\n |\t\n \t|a b|a  b|a   b| a|a |  a  "
    "|a\tb|a\nb|a\n\nb"
)
_DIGITS = """0|7|10|42|007|123|1234|12345|123456789|1000000|3.14159|1e-10|-273.15|1,234,567.89
50%|$19.99
2026-11-22|23:59:59|+1 (555) 010-9999|0xDEADBEEF|192.168.0.1|v1.2.3-rc.4|1/2 + 3/4 = 5/4|x2y3z4
3rd|99 bottles"""
_WORDS = """Hello|hello world|HELLO WORLD|The quick brown fox jumps over the lazy dog.|don't
I'll|we've|they're|it's
O'Neill's|naïve café|e.g.|i.e.,|Dr. Smith-Jones|antidisestablishmentarianism
aaaaaaaaaaaaaaaaaaaaaaaa|state-of-the-art
"quoted"|'single'|“curly”|‘apostrophe’|ellipsis…|em—dash|en–dash|a.b.c|!!!|???|...
(a) [b] {c} <d>|@user #tag|~/.bashrc
https://example.org/a/b?c=d&e=f#g|name@example.org|C:\\Users\\x|50 °C ± 2|½ ¾ ²|™ © ®|€ £ ¥ ₿
→ ← ⇒ ∀ ∃ ∑ √"""
_SCRIPTS = """Привет, мир!|Съешь же ещё этих мягких французских булок|Київ|你好,世界
人工智能和机器学习|日本語のテキスト|カタカナ|한국어 문장
العربية|עברית|ไทย|हिन्दी|ελληνικά|Ünïcödé|Ångström|Straße|ﬁ ligature|Ⅷ|Z͑ͫaͣlgo
e\u0301 combining|\u00a0nbsp|\u200bzero width|\ufeffBOM"""
_EMOJI = """😀|😀😀|👍🏽|👩‍👩‍👧‍👦|🇩🇪|❤️|a😀b|🤖 beep|☃"""
_CODE = [
    "def f(x):\n    return x + 1\n",
    "for (int i = 0; i < n; ++i) { a[i] <<= 2; }",
    "\tif err != nil {\n\t\treturn nil, err\n\t}",
    "SELECT * FROM t WHERE a = 'b' AND c >= 10;",
    '{"name": "text_formatter", "arguments": {"width": 40, "text": "a\\nb"}}',
    '<div class="a">&nbsp;</div><!-- c -->',
    "```python\nprint('hi')\n```",
    "# Heading\n\n- item 1\n- item 2\n\n| a | b |\n|---|---|\n| 1 | 2 |",
    "a = [1, 2, 3]; b = {**c, 'd': None}",
    "$ grep -rn 'x' . | sort -u > out.txt 2>&1",
    r"\frac{a}{b} \sum_{i=0}^{n} x_i^2",
    "camelCase snake_case SCREAMING_CASE kebab-case",
    "### Instruction:\nSay hi.\n\n### Response:\nhi",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<s>[INST] hi [/INST]</s>",
    "<|im_start|",
    "<|endoftext|>",
    "<tool_call>\n{}\n</tool_call>",
    " " * 4 + "indented",
    " " * 17 + "x",
    "\n" * 8 + "x",
    "=" * 40,
    "x" * 300,
    "word " * 60,
    "١٢٣ 一二三 ①②③",
    "H₂O, x² + y³ ≥ ½, 5¼ inches, №7, １２３",
]

CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "What is a tome?"}],
    [{"role": "user", "content": "  Add 12345 and 678.\n\nShow your work.  "}],
    [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Почему небо голубое? 为什么? 🙂"},
    ],
    [
        {"role": "user", "content": "Write a Python function that doubles a number."},
        {"role": "assistant", "content": "def double(x):\n    return 2 * x"},
        {"role": "user", "content": "Now one that halves it."},
    ],
    [
        {"role": "system", "content": "You are a careful assistant."},
        {"role": "user", "content": "Name three colours."},
        {"role": "assistant", "content": "Red, green and blue."},
        {"role": "user", "content": 'And as JSON, with "name" keys?'},
    ],
    [
        {"role": "user", "content": "  What do </s>, <|im_end|> and <|eot_id|> mean?"},
        {"role": "assistant", "content": " Each one ends a turn:\n<s>[INST] hi [/INST]</s>"},
        {"role": "user", "content": "And <|im_start|>, typed by me?"},
    ],
]
STOP_CONVERSATION: list[Message] = [{"role": "user", "content": "Say hello in one short sentence."}]


def hard_texts(special_tokens: list[str]) -> list[str]:
    """Give the strings to tokenize, the tokenizer's own special tokens among them."""
    blocks = [_DIGITS, _WORDS, _SCRIPTS, _EMOJI]
    texts = _WHITE_SPACE.split("|") + [
        text for block in blocks for line in block.splitlines() for text in line.split("|")
    ]
    texts += _CODE
    for token in special_tokens:
        texts += [token, f"before{token}after", f"before {token} after\n{token}"]
    return texts
