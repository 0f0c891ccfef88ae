"""Templates of the requests of the built-in traffic generator, by domain."""

from __future__ import annotations

# For every domain: the templates of the first three quarters, and those kept for the last.
TEMPLATES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "code": (
        {
            "function": "Write a {language} function that {task.does}.",
            "commented": "I need {language} code that {task.does}. Keep it short and comment each step.",
            "complete": "Complete this Python function. It {task.does}.\n\ndef {task.call}:",
            "unit-tests": "Write {handful} unit tests in Python for `{task.call}`, a function that {task.does}.",
            "example-call": "Show how to call a {language} function that {task.does}, with a sample input and its "
            "output.",
            "explain-output": "What does this Python code print, and why? Answer as if to {relative}.\n\n{snippet}",
            "translate": "Rewrite this Python code in {language}:\n\n{snippet}",
            "concept": "What is {concept} in {language}? Give a small example.",
            "difference": "What is the difference between {concept} and {concept2}? Show a line of code for each.",
            "class": "Define a type for a {thing} in {language}, with {handful} attributes and a way to print them.",
            "complexity": "What is the time complexity of {algorithm}? Sketch the algorithm in {language}.",
            "loop": "Write a {language} loop that prints every number from {few} to {some} that is divisible by 3.",
            "regex": "Give a regular expression that matches {pattern}, and show how to use it in {language}.",
            "shell": "Which shell command {chore}? Explain its options to a {audience}.",
            "html": "Write the HTML for {widget} on the site of a {shop}.",
        },
        {
            "one-liner": "Is there a one-line way in {language} to write something that {task.does}? Show it.",
            "type-hints": "Add type hints and a docstring to `{task.call}`, which {task.does}, for {name}'s code "
            "review.",
            "handle-failure": "How do I deal with {failure} in {language}? Show the code.",
            "small-program": "Sketch a small {language} program that {program}.",
            "model-data": "Which data would you keep for a {thing}? Answer with a {language} type definition.",
            "choose": "When would you choose {concept} in a {language} project, and when not?",
            "trace": "Trace this code line by line and give the value of each variable:\n\n{snippet}\n\nThen rename "
            "them for a program about {fruit}.",
            "cheat-sheet": "Make a cheat sheet for {language}: {pattern} as a regular expression, and {widget} as "
            "markup.",
        },
    ),
    "sql": (
        {
            "top": "Table: {table.schema}\n\nWrite a SQL query that returns the {few} rows with the highest "
            "{table.number}.",
            "average": "Given {table.schema}, write SQL for the average {table.number} of each {table.group} since "
            "{year}.",
            "having": "Table {table.schema}. Which values of {table.group} have more than {some} rows? Answer in SQL.",
            "filter": "Using {table.schema}, list the {table.label} of all rows where {table.number} is above {many}.",
            "year": "How do I count the rows of {table.schema} whose {table.date} falls in {year}? Give the query.",
            "update": "Write a SQL statement that raises {table.number} by {percent} percent in {table.schema}.",
            "delete": "Delete from {table.name} every row with {table.date} before {year}. The table is "
            "{table.schema}.",
            "create": "Write a CREATE TABLE statement for {table.schema} with fitting types, and a check that "
            "{table.number} is at least {few}.",
            "insert": "Insert a sample row into {table.schema} with {table.number} equal to {many}.",
            "explain": "Explain this query in plain words:\n\nSELECT {table.group}, SUM({table.number}) FROM "
            "{table.name} GROUP BY {table.group} ORDER BY 2 DESC LIMIT {few};",
            "rank": "For {table.schema}, number the rows of each {table.group} from high to low {table.number}, and "
            "keep the first {few}.",
            "nulls": "In {table.schema} some {table.number} are missing. Write SQL for the average that takes them as "
            "{few}.",
            "join": "Tables:\n{join.schemas}\n\nWrite a SQL query that lists each {join.label} with the number of "
            "{join.children}, if there are more than {few}.",
            "join-sum": "I have {join.parent} and {join.children}:\n{join.schemas}\n\nWhat is the total {join.number} "
            "per {join.label}? Show only totals above {many}.",
        },
        {
            "view": "Define a view on {table.schema} that shows {table.label} and {table.date} where {table.number} "
            "is at least {many}.",
            "second": "What is the second highest {table.number} since {year}?\n\nSchema: {table.schema}",
            "orphans": "Schema:\n{join.schemas}\n\nFind every row of {join.parent} without any {join.children}, and "
            "show at most {some} of them.",
            "running": "Write a query over {table.schema} that adds a running total of {table.number} by "
            "{table.date}, starting in {year}.",
            "bands": "Sort the rows of {table.schema} into low, middle and high {table.number}, with limits at {some} "
            "and {many}.",
            "index": "Queries on {table.schema} that filter by {table.group} and {table.date} take {some} seconds. "
            "Which index helps?",
            "above-average": "Tables:\n{join.schemas}\n\nWhich {join.children} have a {join.number} over {percent}% "
            "above the average?",
        },
    ),
    "math": (
        {
            "shopping": "{name} buys {few} boxes with {some} {fruit} in each and gives away {few2}. How many are left?",
            "cost": "A bag of {fruit} costs ${price}. How much do {some} bags cost, and what is the change from $9000?",
            "speed": "A {vehicle} covers {many} kilometres in {few} hours. What is its average speed?",
            "area": "A rectangular {shape} is {some} metres long and {few} metres wide. Find its area and perimeter.",
            "discount": "A jacket costs ${many} and is reduced by {percent}%. What does {name} pay?",
            "share": "{name} and {name2} share {many} {fruit} so that {name} gets {few} more. How many does each get?",
            "average": "What is the average of {some}, {some2} and {many}? Show the steps.",
            "equation": "Solve for x: {few}x + {some} = {many}.",
            "sequence": "A sequence starts at {some} and grows by {few} each time. What is its {some2}th term?",
            "percent-of": "What is {percent}% of {many}? Explain how {name} could do it without a calculator.",
            "probability": "A jar holds {few} red and {some} blue {fruit}. What is the probability of drawing a red "
            "one?",
            "ages": "{name} is {some} years old and {name2} is {few} years younger. How old will they be in {few2} "
            "years together?",
            "ratio": "Divide {many} {fruit} between {name} and {name2} in the ratio {few} to {few2}.",
            "convert": "How many seconds are there in {few} hours and {some} minutes?",
            "savings": "{name} saves ${price} a week. After how many weeks does {name} have ${money}?",
        },
        {
            "work-rate": "One {worker} finishes a job in {few} days and another in {some} days. How long do they take "
            "together?",
            "reading": "{name} reads {some} pages a day of a book with {many} pages. On which day does the book end?",
            "mixture": "How much water must be added to {some} litres of a {percent}% solution to halve its strength?",
            "multiples": "Find the least common multiple and the greatest common divisor of {some} and {many}.",
            "meeting": "A {vehicle} leaves at noon at {some} km/h; a second one follows an hour later at {many} km/h. "
            "When does it catch up?",
            "triangle": "The legs of a right triangle measure {few} and {some} cm. Find the hypotenuse, to one "
            "decimal.",
            "stacking": "{name} stacks {fruit} in rows: {few} in the first, and one more in each later row. How many "
            "are in {some} rows?",
        },
    ),
    "finance": (
        {
            "compound": "If I invest ${money} at {rate}% a year, compounded annually, what do I have after {years} "
            "years?",
            "simple": "How much simple interest does ${money} earn at {rate}% over {years} years? Show the formula.",
            "define": "What is {term}? Explain it to {relative} with an example.",
            "compare-terms": "What is the difference between {term} and {term2}?",
            "rent-share": "I earn ${salary} a year and pay ${rent} rent a month. What share of my income is that, and "
            "is it too much?",
            "markup": "A {shop} buys an article for ${price} and adds a markup of {percent}%. What is the selling "
            "price?",
            "recover": "A share fell by {percent}% from ${many}. What is it worth now, and what gain brings it back?",
            "tax": "On an income of ${salary} the tax is {percent}%. What remains a year and a month?",
            "risks": "What are the main risks of putting {percent}% of my savings into {asset}?",
            "rates": "How do rising interest rates affect {asset} and {asset2}?",
            "break-even": "A {shop} has fixed costs of ${money} a month and earns ${price} on each sale. How many "
            "sales does it need to break even?",
            "inflation": "At an inflation rate of {rate}%, what will something that costs ${money} today cost in "
            "{years} years?",
            "reserve": "I spend ${rent} a month and can put aside ${price} a week. How long until I have three months "
            "in reserve?",
            "business-tip": "Name {handful} ways in which a {shop} can improve its cash flow.",
        },
        {
            "write-off": "A {shop} buys a machine for ${money} and writes it off evenly over {years} years. What is "
            "it worth after two years?",
            "double": "Roughly how long does it take {name} to double ${money} at {rate}%? Use the rule of 72.",
            "card": "I owe ${money} on a credit card at {percent}% a year and pay back ${rent} a month. What should I "
            "know?",
            "checklist": "Write a short checklist for {relative}, who earns ${salary} and wants to {goal}.",
            "bank-letter": "Write a brief letter in which {name} asks the bank to {bank_request}.",
            "ledger": "Which accounts are debited and credited when a {shop} {entry}, for ${money}?",
            "pitch": "Explain {term} and {asset} to an investor in {city}, in two short paragraphs.",
        },
    ),
    "chat": (
        {
            "email": "Write a short, polite email to {role} to {request}.",
            "explain": "Explain {phenomenon} to a {audience} in a few sentences.",
            "visit": "I have {handful} free days in {city} in {season}. What should I do?",
            "cook": "What can I cook with {food} and {food2} for {handful} people?",
            "poem": "Write a short poem about {animal} in {season}.",
            "story": "Tell a very short story about {animal} that travels to {city}.",
            "nervous": "I am nervous about {event}. Give me {handful} pieces of advice.",
            "word": 'What does the word "{word}" mean? Use it in a sentence about {hobby}.',
            "quiz": "Ask {handful} quiz questions about {phenomenon}, and give the answers.",
            "gift": "Suggest {handful} gifts for {relative}, who loves {hobby}.",
            "beginner": "How does a {audience} get started with {hobby}?",
            "debate": "Give {handful} arguments for {motion} and one against.",
            "choose": "Should {name} take up {hobby} or {hobby2}? Compare them briefly.",
            "text-message": "Write a friendly text message that wishes {name} good luck for {event}.",
        },
        {
            "toast": "Write a toast for the {occasion} of {relative}, who adores {hobby}.",
            "headline": "Invent a headline and an opening sentence about {animal} seen in {city}.",
            "myth": "Is it true that {myth}? Answer as you would to a {audience}.",
            "packing": "Make a packing list for a trip to {city} during {season}.",
            "dialogue": "Write a dialogue of six lines in which {name} and {role} talk about {event}.",
            "menu": "Plan a dinner around {food} and {food2}: a starter, a main dish and a dessert.",
            "opinion": "Summarize what people in {city} might say about {motion}.",
            "note": "Leave a note for {role} to {request}, and mention {hobby}.",
        },
    ),
}
