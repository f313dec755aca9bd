"""Worked examples that are shown before a GSM8K problem; written for mlakit, in no data set."""

EXAMPLES = (
    (
        "A bakery packs 6 rolls in a bag. On Saturday it sold 14 bags and 5 single rolls. How many"
        " rolls did it sell?",
        "The bags held 14 * 6 = 84 rolls.\n"
        "With the single ones that is 84 + 5 = 89 rolls.\n#### 89",
    ),
    (
        "Nadia has 45 stamps. She gives a third of them to her brother and then buys 12 new ones."
        " How many stamps does she have now?",
        "She gives away 45 / 3 = 15 stamps.\nThat leaves 45 - 15 = 30 stamps.\n"
        "After buying she has 30 + 12 = 42 stamps.\n#### 42",
    ),
    (
        "A bus leaves with 38 passengers. At the first stop 11 get off and 7 get on. At the second"
        " stop half of those on board get off. How many are still on the bus?",
        "After the first stop there are 38 - 11 + 7 = 34 passengers.\n"
        "At the second stop 34 / 2 = 17 get off.\nSo 34 - 17 = 17 are still on the bus.\n#### 17",
    ),
    (
        "Tickets for a play cost $9 for adults and $4 for children. A group of 3 adults and 8"
        " children pays with a $100 note. How many dollars do they get back?",
        "The adults pay 3 * 9 = 27 dollars.\nThe children pay 8 * 4 = 32 dollars.\n"
        "Together that is 27 + 32 = 59 dollars.\nThey get back 100 - 59 = 41 dollars.\n#### 41",
    ),
    (
        "Omar reads 25 pages a day from Monday to Friday and twice as many on each day of the"
        " weekend. How many pages does he read in a week?",
        "From Monday to Friday he reads 5 * 25 = 125 pages.\n"
        "On a day of the weekend he reads 2 * 25 = 50 pages.\n"
        "The weekend gives 2 * 50 = 100 pages.\n"
        "In a week he reads 125 + 100 = 225 pages.\n#### 225",
    ),
    (
        "A tank holds 600 liters and is 40% full. A pump adds 30 liters a minute. After how many"
        " minutes is the tank full?",
        "The tank holds 600 * 0.4 = 240 liters now.\n600 - 240 = 360 liters are missing.\n"
        "That takes 360 / 30 = 12 minutes.\n#### 12",
    ),
    (
        "Lena is 4 years older than Tom. In 6 years Tom will be 20. How old is Lena today?",
        "Today Tom is 20 - 6 = 14 years old.\nLena is 14 + 4 = 18 years old.\n#### 18",
    ),
    (
        "A workshop makes 120 chairs a week and sells them for $35 each. Wood costs $10 for every"
        " chair, and rent is $800 a week. What is the profit of a week, in dollars?",
        "Each chair leaves 35 - 10 = 25 dollars.\n120 chairs leave 120 * 25 = 3000 dollars.\n"
        "After the rent 3000 - 800 = 2200 dollars are left.\n#### 2200",
    ),
)
"""Question and answer, the answer as the data set writes it: steps, then ``####`` and a number."""
