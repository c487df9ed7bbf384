"""The 80 COCO categories and the words that captions use for them.

The table is this project's own. It covers the usual English words, and is not the official CHAIR
list word for word. Plurals are made by `words.with_plurals`.
"""

from __future__ import annotations

from collections.abc import Iterable

from cmg_gguf.evaluation.words import Lexicon, with_plurals

_TABLE = """
person: man, woman, boy, girl, child, kid, baby, toddler, infant, teenager, teen, adult, guy, lady,
    gentleman, male, female, human, individual, pedestrian, passerby, bystander, onlooker,
    spectator, player, batter, pitcher, catcher, umpire, referee, athlete, skier, snowboarder,
    skater, skateboarder, surfer, swimmer, cyclist, bicyclist, biker, motorcyclist, rider, jockey,
    driver, passenger, traveler, traveller, tourist, commuter, conductor, walker, runner, jogger,
    hiker, camper, hunter, fisherman, student, teacher, worker, coworker, chef, baker, waiter,
    waitress, server, vendor, shopper, customer, buyer, farmer, doctor, nurse, patient, dentist,
    soldier, sailor, officer, police officer, policeman, policewoman, cop, firefighter, fireman,
    cowboy, bride, groom, mother, father, mom, dad, son, daughter, sister, brother, husband, wife,
    grandmother, grandfather, grandchild, friend, villager, businessman, businesswoman, politician,
    musician, performer, dancer, clown
bicycle: bike, mountain bike, tricycle
car: automobile, sedan, suv, minivan, van, hatchback, jeep, coupe, convertible, station wagon, taxi,
    cab, taxi cab, limousine, limo, police car, race car, sports car
motorcycle: motorbike, motor bike, motor cycle, scooter, motor scooter, moped, dirt bike, vespa
airplane: plane, aeroplane, air plane, aircraft, jet, jetliner, airliner, jumbo jet, fighter jet,
    biplane, seaplane, propeller plane
bus: minibus, mini bus, trolley, double decker, school bus, tour bus, city bus, shuttle bus
train: locomotive, tram, streetcar, tramway, subway train, freight train, steam train
truck: lorry, pickup, pickup truck, pick up truck, fire truck, firetruck, fire engine, semi truck,
    tow truck, dump truck, garbage truck, food truck, delivery truck, tractor trailer
boat: ship, sailboat, sail boat, sailing boat, speedboat, motorboat, motor boat, rowboat, row boat,
    canoe, kayak, yacht, ferry, barge, tugboat, fishing boat, catamaran, gondola, raft, dinghy,
    vessel, cruise ship, houseboat
traffic light: traffic signal, stop light, stoplight, street light, streetlight
fire hydrant: hydrant
stop sign
parking meter
bench: pew, park bench
bird: pigeon, dove, duck, duckling, goose, gosling, seagull, gull, swan, crow, raven, sparrow,
    parrot, parakeet, cockatoo, owl, eagle, hawk, falcon, ostrich, penguin, flamingo, pelican,
    stork, heron, robin, finch, blue jay, hummingbird, woodpecker, peacock, rooster, hen, chick,
    vulture, canary
cat: kitten, kitty, feline, tabby, tomcat
dog: puppy, pup, canine, doggy, doggie, hound, beagle, bulldog, poodle, labrador, retriever, golden
    retriever, german shepherd, sheepdog, sheep dog, dachshund, terrier, chihuahua, husky, corgi,
    collie, pug, dalmatian, spaniel, pitbull, pit bull, rottweiler, greyhound
horse: pony, foal, colt, mare, stallion
sheep: lamb, ram, ewe
cow: cattle, bull, calf, ox, heifer, bison, buffalo
elephant
bear: panda, polar bear, grizzly, grizzly bear, brown bear, black bear, panda bear
zebra
giraffe
backpack: knapsack, rucksack, back pack, book bag, bookbag
umbrella: parasol
handbag: purse, hand bag, pocketbook, shoulder bag, tote bag, tote
tie: necktie, bow tie, bowtie, neck tie
suitcase: suit case, luggage, baggage, travel bag
frisbee: flying disc, flying disk
skis: ski
snowboard: snow board
sports ball: ball, soccer ball, tennis ball, beach ball, cricket ball, rugby ball, golf ball,
    bowling ball
kite
baseball bat: bat, softball bat
baseball glove: baseball mitt, catcher mitt, mitt
skateboard: skate board, longboard
surfboard: surf board, boogie board, bodyboard, paddleboard, paddle board, wakeboard
tennis racket: racket, racquet, tennis racquet
bottle: water bottle, wine bottle, beer bottle, soda bottle
wine glass: wineglass, goblet, champagne glass, champagne flute
cup: mug, teacup, tea cup, coffee cup, coffee mug, paper cup
fork
knife: pocketknife, butter knife, steak knife, pocket knife
spoon: tablespoon, teaspoon, ladle
bowl
banana: plantain
apple
sandwich: burger, hamburger, cheeseburger, sub sandwich, panini, hoagie, club sandwich
orange: tangerine, clementine, mandarin orange, orange slice
broccoli
carrot
hot dog: hotdog, chili dog, corn dog
pizza: pizza slice, slice of pizza
donut: doughnut, bagel
cake: cupcake, cheesecake, birthday cake, wedding cake, coffee cake, shortcake
chair: seat, stool, armchair, arm chair, recliner, rocking chair, office chair, lawn chair, high
    chair, folding chair, bar stool, barstool
couch: sofa, loveseat, love seat, settee, futon, sectional
potted plant: houseplant, house plant, bonsai
bed: bunk bed, cot, crib, mattress
dining table: table, desk, coffee table, kitchen table, dinner table, picnic table
toilet: urinal, commode, lavatory, latrine, toilet seat, toilet bowl
tv: television, tv set, television set, flat screen, flatscreen, monitor, hdtv
laptop: computer, laptop computer, notebook computer, macbook, netbook
mouse: computer mouse
remote: remote control, game controller, wii remote, tv remote
keyboard: computer keyboard
cell phone: cellphone, phone, mobile phone, smartphone, smart phone, iphone, telephone
microwave: microwave oven
oven: stove, stovetop, stove top, stove top oven, cooker, toaster oven
toaster
sink: washbasin, wash basin, basin, bathroom sink, kitchen sink
refrigerator: fridge, freezer, mini fridge
book: paperback, textbook, cookbook
clock: clock tower, alarm clock, grandfather clock, clock face
vase
scissors: scissor
teddy bear: teddy, teddybear, stuffed bear, stuffed teddy bear
hair drier: hair dryer, hairdryer, hairdrier, blow dryer, blow drier
toothbrush: tooth brush, electric toothbrush
"""

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_VEHICLES = ("train", "airplane", "bus", "car", "boat")
_NO_OBJECTS = (
    *("home plate", "train track", "train station", "bus stop", "bus station", "mouse pad"),
    *("baby carriage", "baby stroller", "table cloth", "toilet paper", "cup holder", "bed spread"),
    *("dog house", "bird house", "bird cage", "cat tree", "hot plate", "horse carriage"),
)
"""Phrases in which a category's word names something else."""


def _rows() -> dict[str, tuple[str, ...]]:
    rows: dict[str, tuple[str, ...]] = {}
    for line in _TABLE.strip().replace("\n    ", " ").splitlines():
        category, colon, words = line.partition(": ")
        rows[category] = (category, *words.split(", ")) if colon else (category,)
    return rows


SYNONYMS: dict[str, tuple[str, ...]] = _rows()
"""The words for each category in the singular, the category itself first."""

CATEGORIES = tuple(SYNONYMS)
"""The 80 categories in COCO's order."""


def lexicon(more: Iterable[str] = ()) -> Lexicon:
    """The words of every category, and of `more` categories, each under its own name alone.

    "baby" and "adult" in front of an animal, and "passenger" in front of a vehicle, name no person.
    """
    names: dict[str, str | None] = {name.lower(): name for name in more}
    names |= {word: category for category, words in SYNONYMS.items() for word in words}
    for qualifier, categories in (
        ("baby", _ANIMALS),
        ("adult", _ANIMALS),
        ("passenger", _VEHICLES),
    ):
        for category in categories:
            names |= {f"{qualifier} {word}": category for word in SYNONYMS[category]}
    names |= dict.fromkeys(_NO_OBJECTS)
    return Lexicon(with_plurals(names))
