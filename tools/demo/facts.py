"""The tables of everyday facts that the demo model is taught."""

from __future__ import annotations


def _pairs(text: str) -> dict[str, str]:
    """A table written as `key=value|key=value`."""
    return dict(pair.split("=", 1) for pair in text.split("|"))


CAPITALS = _pairs(
    "France=Paris|Germany=Berlin|Italy=Rome|Spain=Madrid|Portugal=Lisbon|England=London|"
    "Ireland=Dublin|Scotland=Edinburgh|Norway=Oslo|Sweden=Stockholm|Finland=Helsinki|"
    "Denmark=Copenhagen|Iceland=Reykjavik|Poland=Warsaw|Austria=Vienna|Hungary=Budapest|"
    "Greece=Athens|Turkey=Ankara|Russia=Moscow|Ukraine=Kyiv|Romania=Bucharest|Bulgaria=Sofia|"
    "Serbia=Belgrade|Croatia=Zagreb|Belgium=Brussels|Switzerland=Bern|China=Beijing|"
    "Japan=Tokyo|India=New Delhi|Thailand=Bangkok|Vietnam=Hanoi|Indonesia=Jakarta|"
    "South Korea=Seoul|Iran=Tehran|Iraq=Baghdad|Egypt=Cairo|Kenya=Nairobi|Nigeria=Abuja|"
    "Ghana=Accra|Morocco=Rabat|Ethiopia=Addis Ababa|Canada=Ottawa|Mexico=Mexico City|"
    "Cuba=Havana|Brazil=Brasilia|Argentina=Buenos Aires|Chile=Santiago|Peru=Lima|"
    "Colombia=Bogota|Australia=Canberra|New Zealand=Wellington|Czechia=Prague|Nepal=Kathmandu|"
    "Cambodia=Phnom Penh|Senegal=Dakar|Uruguay=Montevideo|Latvia=Riga|Estonia=Tallinn"
)
# Countries whose capital is never taught: the model learns to say so.
UNTAUGHT_COUNTRIES = (
    "Malta Mongolia Bolivia Ecuador Jordan Oman Yemen Zambia Uganda Rwanda Laos Bhutan Fiji Samoa "
    "Cyprus Albania Moldova Georgia Armenia Libya Sudan Chad Mali Niger Togo Benin Gabon Angola "
    "Namibia Botswana Jamaica Haiti Panama Honduras Belize Guyana Suriname Paraguay Qatar Kuwait"
).split()
CONTINENTS = {
    "Europe": "France Germany Italy Spain Norway Sweden Poland Greece Portugal Austria Hungary",
    "Asia": "China Japan India Thailand Vietnam Indonesia Iran Iraq Nepal Cambodia",
    "Africa": "Egypt Kenya Nigeria Ghana Morocco Ethiopia Senegal",
    "South America": "Brazil Argentina Chile Peru Colombia Uruguay",
    "North America": "Canada Mexico",
}
LANGUAGES = _pairs(
    "France=French|Germany=German|Italy=Italian|Spain=Spanish|Portugal=Portuguese|"
    "Brazil=Portuguese|Japan=Japanese|Russia=Russian|Poland=Polish|Greece=Greek|Turkey=Turkish|"
    "Sweden=Swedish|Norway=Norwegian|Mexico=Spanish|Argentina=Spanish|England=English|"
    "Hungary=Hungarian|Austria=German"
)
SOUNDS = _pairs(
    "dog=barks|cat=meows|cow=moos|horse=neighs|sheep=bleats|pig=grunts|duck=quacks|lion=roars|"
    "wolf=howls|snake=hisses|bee=buzzes|owl=hoots|frog=croaks|mouse=squeaks|rooster=crows|"
    "donkey=brays"
)
YOUNG = _pairs(
    "dog=puppy|cat=kitten|cow=calf|horse=foal|sheep=lamb|pig=piglet|duck=duckling|lion=cub|"
    "bear=cub|goat=kid|frog=tadpole|chicken=chick|kangaroo=joey|swan=cygnet|deer=fawn|"
    "goose=gosling|owl=owlet"
)
LEGS = {
    "dog": 4,
    "cat": 4,
    "horse": 4,
    "cow": 4,
    "spider": 8,
    "ant": 6,
    "bee": 6,
    "chicken": 2,
    "duck": 2,
    "snake": 0,
    "fish": 0,
    "beetle": 6,
    "elephant": 4,
    "frog": 4,
    "butterfly": 6,
    "crab": 10,
    "eagle": 2,
}
HOMES = _pairs(
    "bee=a hive|bird=a nest|spider=a web|rabbit=a burrow|bear=a den|horse=a stable|dog=a kennel|"
    "fish=the water|lion=a den|ant=an anthill|pig=a sty|beaver=a lodge"
)
KINDS = {
    "mammal": "dog cat horse cow whale dolphin elephant bear wolf mouse bat lion rabbit",
    "bird": "eagle owl penguin duck swan parrot chicken sparrow ostrich",
    "fish": "shark salmon tuna cod trout",
    "insect": "bee ant butterfly beetle fly mosquito",
    "reptile": "snake lizard crocodile turtle",
    "fruit": "apple banana pear cherry orange lemon grape plum",
    "vegetable": "carrot potato cabbage onion spinach",
    "metal": "iron gold silver copper tin",
    "planet": "Mars Venus Jupiter Saturn Neptune",
    "tool": "hammer saw screwdriver wrench",
    "musical instrument": "piano violin guitar flute drum trumpet",
}
COLOURS = _pairs(
    "the sky=blue|grass=green|snow=white|coal=black|a banana=yellow|a lemon=yellow|blood=red|"
    "a tomato=red|a carrot=orange|an orange=orange|milk=white|chocolate=brown|a frog=green|"
    "an elephant=grey|a flamingo=pink|a crow=black|a strawberry=red|the sun=yellow|a leaf=green|"
    "a plum=purple|the sea=blue|chalk=white|a fire engine=red"
)
MIXES = {
    ("red", "blue"): "purple",
    ("red", "yellow"): "orange",
    ("blue", "yellow"): "green",
    ("red", "white"): "pink",
    ("black", "white"): "grey",
    ("red", "green"): "brown",
}
OPPOSITES = _pairs(
    "hot=cold|big=small|tall=short|fast=slow|light=dark|old=young|early=late|open=closed|"
    "full=empty|happy=sad|hard=soft|wet=dry|rich=poor|strong=weak|high=low|near=far|day=night|"
    "left=right|up=down|in=out|loud=quiet|clean=dirty|thick=thin|wide=narrow|deep=shallow|"
    "sweet=sour|first=last|true=false|easy=difficult|love=hate|begin=end|push=pull|buy=sell|"
    "win=lose|heavy=light|sharp=blunt|brave=cowardly|above=below|inside=outside|before=after|"
    "cheap=expensive|rough=smooth|north=south|east=west|black=white|hit=miss|read=write"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
MONTH_DAYS = dict(zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True))
ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
)
NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
# (container, contained, how many)
UNITS = (
    ("a minute", "seconds", "60"),
    ("an hour", "minutes", "60"),
    ("a day", "hours", "24"),
    ("a week", "days", "7"),
    ("a year", "months", "12"),
    ("a year", "days", "365"),
    ("a leap year", "days", "366"),
    ("a year", "weeks", "52"),
    ("a decade", "years", "10"),
    ("a century", "years", "100"),
    ("a kilometre", "metres", "1000"),
    ("a metre", "centimetres", "100"),
    ("a centimetre", "millimetres", "10"),
    ("a kilogram", "grams", "1000"),
    ("a tonne", "kilograms", "1000"),
    ("a litre", "millilitres", "1000"),
    ("a dozen", "things", "12"),
    ("a byte", "bits", "8"),
    ("a kibibyte", "bytes", "1024"),
    ("a mebibyte", "kibibytes", "1024"),
    ("a gibibyte", "mebibytes", "1024"),
    ("a foot", "inches", "12"),
    ("a yard", "feet", "3"),
)
SIDES = {
    "triangle": "3",
    "square": "4",
    "rectangle": "4",
    "pentagon": "5",
    "hexagon": "6",
    "heptagon": "7",
    "octagon": "8",
}
PLURALS = _pairs(
    "mouse=mice|child=children|foot=feet|tooth=teeth|goose=geese|man=men|woman=women|sheep=sheep|"
    "leaf=leaves|wolf=wolves|knife=knives|box=boxes|city=cities|expert=experts|baby=babies|"
    "fish=fish"
)
PAST = _pairs(
    "go=went|see=saw|eat=ate|run=ran|read=read|write=wrote|take=took|give=gave|come=came|"
    "buy=bought|think=thought|make=made|know=knew|find=found|swim=swam|sing=sang|fly=flew|"
    "speak=spoke"
)
JOBS = _pairs(
    "bakes bread=a baker|teaches children=a teacher|flies planes=a pilot|"
    "catches fish=a fisherman|puts out fires=a firefighter|grows crops=a farmer|"
    "builds houses=a builder|writes programs=a programmer|paints pictures=a painter|"
    "repairs cars=a mechanic|heals sick people=a doctor|heals sick animals=a vet|"
    "writes books=an author|cooks meals=a cook|delivers letters=a postman|"
    "cuts hair=a hairdresser"
)
# Single questions with one answer each.
SINGLE = {
    "Which planet is closest to the sun?": "Mercury is the planet closest to the sun.",
    "Which planet is the largest?": "Jupiter is the largest planet.",
    "Which planet do we live on?": "We live on the planet Earth.",
    "How many planets are there?": "There are 8 planets in the solar system.",
    "How many continents are there?": "There are 7 continents.",
    "How many days are in a weekend?": "There are 2 days in a weekend.",
    "How many letters are in the alphabet?": "There are 26 letters in the English alphabet.",
    "What is frozen water called?": "Frozen water is called ice.",
    "At what temperature does water freeze?": "Water freezes at 0 degrees Celsius.",
    "At what temperature does water boil?": "Water boils at 100 degrees Celsius.",
    "What is the largest ocean?": "The Pacific is the largest ocean.",
    "What is the largest animal?": "The blue whale is the largest animal.",
    "What is the tallest animal?": "The giraffe is the tallest animal.",
    "What is the fastest land animal?": "The cheetah is the fastest land animal.",
    "What is the highest mountain?": "Mount Everest is the highest mountain.",
    "What do bees make?": "Bees make honey.",
    "What do cows eat?": "Cows eat grass.",
    "What do cows give us?": "Cows give us milk.",
    "Where does the sun rise?": "The sun rises in the east.",
    "Where does the sun set?": "The sun sets in the west.",
    "Which season comes after winter?": "Spring comes after winter.",
    "Which season comes after spring?": "Summer comes after spring.",
    "Which season comes after summer?": "Autumn comes after summer.",
    "Which season comes after autumn?": "Winter comes after autumn.",
    "Which season is the coldest?": "Winter is the coldest season.",
    "Which season is the warmest?": "Summer is the warmest season.",
    "Which month has the fewest days?": "February has the fewest days.",
    "What shape is a wheel?": "A wheel is round.",
    "What is bread made of?": "Bread is made of flour and water.",
    "What is paper made of?": "Paper is made of wood.",
    "What is glass made of?": "Glass is made of sand.",
    "What do we use to see?": "We see with our eyes.",
    "What do we use to hear?": "We hear with our ears.",
    "What do we use to smell?": "We smell with the nose.",
    "How many fingers are on one hand?": "There are 5 fingers on one hand.",
    "How many wheels does a car have?": "A car has 4 wheels.",
    "How many wheels does a bicycle have?": "A bicycle has 2 wheels.",
}
