"""Pools of values that the templates of the built-in traffic generator take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

Pool = tuple[Sequence[Any], Sequence[Any]]
"""Values for the first three quarters of a stream, and values kept for its last quarter."""


class _Task(NamedTuple):
    """A small function to write, like `add(a, b)` which "adds two numbers"."""

    call: str
    does: str


class _Table(NamedTuple):
    """A table of a database with a column of each kind."""

    name: str
    label: str
    number: str
    group: str
    date: str

    @property
    def schema(self) -> str:
        return f"{self.name}(id, {self.label}, {self.group}, {self.number}, {self.date})"


class _Join(NamedTuple):
    """Two tables, of which the second refers to the first by `key`."""

    parent: str
    label: str
    children: str
    key: str
    number: str

    @property
    def schemas(self) -> str:
        return f"{self.parent}(id, {self.label})\n{self.children}(id, {self.key}, {self.number})"


def _words(first: str, last: str) -> Pool:
    return first.split("|"), last.split("|")


def _late_words(last: str) -> Pool:
    return (), last.split("|")


def _numbers(start: float, stop: float, step: float = 1) -> Pool:
    """Keep two numbers in seven for the last quarter, by their value, so that no pool gives away another's."""
    values = [start + step * index for index in range(round((stop - start) / step))]
    first, last = ([f"{value:g}" for value in values if (round(value * 10) % 7 < 2) == late] for late in (False, True))
    return first, last


def _rows(kind: Callable[..., Any], separator: str, first: str, last: str) -> Pool:
    """Make values of several parts each, in the order of the fields of ``kind``."""
    rows, late_rows = ([kind(*row.split(separator)) for row in text.split("|")] for text in (first, last))
    return rows, late_rows


POOLS: dict[str, Pool] = {
    # numbers
    "few": _numbers(2, 13),
    "some": _numbers(13, 61),
    "many": _numbers(61, 401),
    "price": _numbers(3, 96),
    "percent": _numbers(4, 61),
    "rate": _numbers(1.1, 9.9, 0.2),
    "years": _numbers(2, 31),
    "rent": _numbers(350, 2000, 50),
    "money": _numbers(2000, 20000, 100),
    "salary": _numbers(28000, 120000, 1000),
    "year": _numbers(1996, 2025),
    "handful": _words("two|three|four", "five|six"),
    # people and places
    "name": _words(
        "Amira|Ben|Chloe|Diego|Elena|Farid|Grace|Hiro|Ines|Jonas|Kavya|Liam|Mona|Noah|Olga|Priya|Quinn|Rosa|Sam|Tara",
        "Umar|Violet|Wanda|Xavier|Yusuf|Zoe|Anselm|Birgit",
    ),
    "city": _words(
        "Lisbon|Kyoto|Nairobi|Prague|Vancouver|Cairo|Melbourne|Oslo|Mumbai|Seville|Chicago|Hanoi",
        "Reykjavik|Tbilisi|Montevideo|Marrakesh|Ljubljana|Busan",
    ),
    "role": _words(
        "my manager|a landlord|a new neighbour|my professor|the school office|a hotel|a customer|the city library",
        "a museum guide|the dentist|a wedding photographer|my football coach|a violin teacher",
    ),
    "relative": _words(
        "my sister|my grandfather|a colleague|my best friend|my aunt|a teenager",
        "my cousin|my father-in-law|an old classmate|my godmother",
    ),
    # code
    "language": _words("Python|JavaScript|Java|C++|Go|Ruby|Perl", "Rust|TypeScript|Kotlin|Swift|PHP|Lua"),
    "task": _rows(
        _Task,
        ": ",
        "count_vowels(text): counts the vowels in a string|is_palindrome(word): checks whether a word is a palindrome|"
        "factorial(n): returns the factorial of a number|second_largest(values): finds the second largest number in a "
        "list|merge_sorted(a, b): merges two sorted lists|remove_duplicates(items): removes duplicates from a list and "
        "keeps the order|is_prime(n): checks whether a number is prime|flatten(nested): flattens a list of lists|"
        "word_frequency(text): counts how often each word occurs|fibonacci(n): returns the first n Fibonacci numbers|"
        "to_celsius(fahrenheit): converts Fahrenheit to Celsius|is_leap(year): tells whether a year is a leap year|"
        "binary_search(values, target): looks up a value in a sorted list|capitalize_words(text): capitalizes every "
        "word in a sentence|common_items(a, b): returns the elements that two lists share|digit_sum(n): adds up the "
        "digits of a number|rotate(values, k): rotates a list by k places|longest_word(text): returns the longest word "
        "of a sentence",
        "gcd(a, b): computes the greatest common divisor of two numbers|transpose(matrix): swaps the rows and columns "
        "of a matrix|mask_email(address): hides all but the first letter of an email address|run_length(text): "
        "compresses a string by counting repeated letters|chunk(items, size): splits a list into pieces of equal size|"
        "to_roman(number): writes a number in Roman numerals|moving_average(values, window): smooths a series of "
        "numbers|parse_query(url): reads the parameters of a web address|is_anagram(a, b): tells whether two words use "
        "the same letters|clamp(value, low, high): keeps a number between two bounds",
    ),
    "concept": _words(
        "a closure|recursion|an interface|a hash map|a linked list|an exception|inheritance|a lambda|a stack|a queue|"
        "a generator|polymorphism|a constructor|a static method|a set",
        "a coroutine|an enum|a binary heap|dependency injection|a mutex|a promise|memoization|a trie",
    ),
    "algorithm": _words(
        "bubble sort|binary search|merge sort|linear search|depth-first search|insertion sort|quicksort|"
        "breadth-first search",
        "heapsort|Dijkstra's algorithm|the sieve of Eratosthenes|topological sorting|radix sort",
    ),
    "thing": _words(
        "bank account|library book|rectangle|student|shopping cart|playlist|thermostat|car|employee|to-do list",
        "chess board|vending machine|elevator|music track|parking garage|weather station",
    ),
    "snippet": _words(
        "for i in range(1, 6):\n    print('*' * i)|values = [3, 1, 2]\nprint(sorted(values)[-1])|"
        "total = 0\nfor n in range(10):\n    if n % 2:\n        total += n\nprint(total)|"
        "words = ['red', 'green']\nprint({w: len(w) for w in words})|x, y = 4, 9\nx, y = y, x\nprint(x - y)|"
        "text = 'banana'\nprint(text.count('a'), text[::-1])|n = 40\nwhile n > 1:\n    n //= 2\n    print(n)|"
        "pairs = list(zip('abc', [1, 2, 3]))\nprint(pairs[1])",
        "a = {1, 2, 3}\nb = {2, 3, 4}\nprint(a & b, a ^ b)|try:\n    print(1 / 0)\nexcept ZeroDivisionError:\n"
        "    print('oops')|def twice(f, x):\n    return f(f(x))\nprint(twice(lambda v: v * 3, 2))|"
        "stack = [1]\nstack.append(2)\nprint(stack.pop(), stack)|print([c for c in 'stream' if c not in 'aeiou'])",
    ),
    "pattern": _words(
        "a date like 2024-05-17|a hexadecimal colour|a phone number with dashes|a five-digit postal code|"
        "an email address|a time like 14:35|a word that starts with a capital letter|a whole number with a sign",
        "an IPv4 address|a hashtag|a licence plate like AB-123-C|a price in euros|a version like 1.12.3",
    ),
    "widget": _words(
        "a login form|a table with three rows|a navigation bar with four links|an unordered list of fruits|"
        "a button that shows an alert|a picture with a caption|a contact form|a page with a heading and two paragraphs",
        "a progress bar|a search box with a submit button|a collapsible section|a footer with three columns|"
        "a drop-down menu of countries",
    ),
    "chore": _words(
        "lists all files by size|finds every file that ends in .log|counts the lines of a file|shows free disk space|"
        "replaces a word in a text file|copies a folder to another machine|shows the running processes|"
        "prints the last 20 lines of a file",
        "makes a script executable|compares two folders|downloads a page to a file|sorts a CSV by its second column|"
        "creates a compressed archive",
    ),
    "failure": _late_words(
        "a missing file|a request that times out|invalid user input|a full disk|a lost database connection|a malformed "
        "date"
    ),
    "program": _late_words(
        "asks for a name and greets the user|guesses a number between 1 and 100|keeps a list of expenses|rolls two "
        "dice until they match|shows a countdown|translates words from a small dictionary"
    ),
    # sql
    "table": _rows(
        _Table,
        " ",
        "employees full_name salary department hired_on|orders customer_name total status ordered_on|"
        "products product_name price category added_on|students surname grade_average major enrolled_on|"
        "flights flight_code seats_sold airline departs_on|books title page_count genre published_on|"
        "patients last_name weight_kg ward admitted_on|songs song_title play_count artist released_on|"
        "invoices client amount_due currency issued_on|matches stadium attendance league played_on|"
        "hotels hotel_name nightly_rate city opened_on|trips driver distance_km vehicle_type started_on|"
        "tickets subject priority_score team created_on|recipes dish calories cuisine posted_on",
        "shipments tracking_code gross_weight carrier shipped_on|donations donor_name gift campaign received_on|"
        "cars number_plate mileage fuel_type registered_on|podcasts episode downloads host aired_on|"
        "plants species height_cm habitat surveyed_on|subscriptions contact_address monthly_fee plan renewed_on|"
        "auctions lot highest_bid house closed_on|sensors tag reading weather_station measured_on",
    ),
    "join": _rows(
        _Join,
        " ",
        "customers name orders customer_id total|authors pen_name novels author_id sales|airlines airline_name routes "
        "airline_id distance|schools school_name pupils school_id age|artists stage_name albums artist_id copies|"
        "clinics clinic_name visits clinic_id fee|farms owner harvests farm_id tonnes|teams nickname players team_id "
        "goals|suppliers company parts supplier_id cost|museums museum_name exhibits museum_id insured_value",
        "landlords family_name flats landlord_id monthly_rent|studios brand films studio_id outlay|banks bank_title "
        "loans bank_id principal|breweries trade_name beers brewery_id strength|couriers callsign parcels courier_id "
        "postage|observatories motto telescopes observatory_id aperture",
    ),
    # math
    "fruit": _words(
        "apples|oranges|pencils|stickers|marbles|cookies|tickets|notebooks|balloons|stamps|muffins|coins",
        "seashells|candles|postcards|walnuts|buttons|paper cranes",
    ),
    "vehicle": _words("train|bus|cyclist|truck|ferry|car", "tram|sailboat|motorbike|hot-air balloon"),
    "shape": _words("garden|playground|poster|swimming pool|carpet|field", "rooftop|banner|vineyard|car park"),
    "worker": _late_words("painter|gardener|printer|baker|bricklayer"),
    # finance
    "term": _words(
        "a bond|a stock|an index fund|compound interest|inflation|a mortgage|liquidity|a dividend|net worth|"
        "a credit score|cash flow|gross profit|depreciation|a budget deficit|an exchange rate|working capital",
        "a hedge fund|an annuity|a stop-loss order|goodwill|a balloon payment|amortization|a yield curve|escrow",
    ),
    "asset": _words(
        "government bonds|technology shares|gold|rental property|a savings account|a pension fund|foreign currencies|"
        "small companies|commodities",
        "corporate bonds|farmland|art|infrastructure funds|silver|start-ups",
    ),
    "shop": _words(
        "bakery|bookshop|coffee stand|bicycle shop|flower shop|hair salon|phone repair shop|toy store|pizzeria",
        "tailor|plant nursery|record store|fish market|pottery studio",
    ),
    "goal": _late_words(
        "buy a first home|pay off student debt|retire early|start a small business|save for a child's education|leave "
        "a family business"
    ),
    "bank_request": _late_words(
        "raise a card limit|waive a late fee|close an account|stop a payment|replace a lost card|explain a charge"
    ),
    "entry": _late_words(
        "buys stock on credit|pays its rent|sells goods for cash|receives a loan|repays a supplier|takes a deposit "
        "from a client"
    ),
    # chat
    "phenomenon": _words(
        "photosynthesis|why the sky is blue|how vaccines work|gravity|how rainbows form|the water cycle|black holes|"
        "why we dream|how batteries work|plate tectonics|how planes fly|what causes tides",
        "why leaves change colour|how sonar works|what makes bread rise|eclipses|how bees find flowers|fermentation",
    ),
    "audience": _words(
        "ten-year-old|curious adult|class of beginners|visitor", "grandparent|busy journalist|puzzled tourist"
    ),
    "hobby": _words(
        "chess|gardening|photography|running|baking|painting|hiking|playing the guitar|bird watching|knitting",
        "pottery|sailing|stargazing|calligraphy|rock climbing|beekeeping",
    ),
    "food": _words(
        "rice|eggs|tomatoes|chickpeas|potatoes|spinach|chicken|mushrooms|pasta|carrots",
        "lentils|aubergine|salmon|pumpkin|halloumi|leeks",
    ),
    "animal": _words(
        "an old cat|a lonely fox|a small owl|a brave mouse|a sleepy bear|a lost puppy|a grey whale",
        "a proud heron|a stubborn goat|a shy hedgehog|a clever octopus",
    ),
    "season": _words("spring|summer|autumn|winter", "the rainy season|the first snow|a heatwave"),
    "event": _words(
        "a job interview|a first day at school|a driving test|moving to a new city|a piano recital|a long flight|"
        "a difficult exam|a speech at work",
        "a marathon|a blind date|a visit to the doctor|a family reunion|a job in a new country",
    ),
    "word": _words(
        "resilient|ambiguous|candid|frugal|meticulous|reluctant|serene|vivid|obsolete|eloquent|tedious|novel",
        "gregarious|ephemeral|stoic|lucid|whimsical|tenacious",
    ),
    "motion": _words(
        "homework in primary school|working from home|school uniforms|a four-day week|free public transport|zoos|"
        "taking a year off before university",
        "daylight saving time|self-driving cars|compulsory voting|cash-free shops|electric scooters in cities",
    ),
    "request": _words(
        "ask for a day off|reschedule a meeting|say thank you for their help|report a broken window|"
        "complain about loud music|ask for a quote|confirm an appointment|apologize for being late",
        "return a borrowed book|invite them to a garden party|cancel a lesson|ask for directions",
    ),
    "occasion": _late_words("retirement|wedding|sixtieth birthday|graduation|house-warming|engagement"),
    "myth": _late_words(
        "goldfish forget everything in seconds|lightning never strikes twice|we use a tenth of our brain|bulls hate "
        "red|sugar makes children wild|the Great Wall can be seen from the Moon|cracking knuckles causes arthritis|"
        "bats are blind|chameleons change colour to hide"
    ),
}
