/**
 * The demo's four little languages, all told from the same seeded scenes: animal stories (what the base model learns),
 * and pirate tales, letters and notices (what adapters teach it). A row of a new domain starts as a story does.
 */

export type Split = "train" | "valid";

/** One training row. The completion starts with its own white space: `prompt + completion` is the text. */
export interface Row {
  readonly prompt: string;
  readonly completion: string;
}

/** What a scene knows: every word a template may ask for. `{He}` is `he` with a capital. */
type Slots = Readonly<Record<string, string>>;

// Templates: {slot}, [one|of|these]. Things may be plural: {they} {them} {were} {are} {some} agree with {thing}.

const SHE = ["Mia", "Lily", "Rosa", "Anna", "Ella", "Nora", "Ruby", "Ivy", "Zoe", "Hazel"];
const HE = ["Tom", "Max", "Ben", "Sam", "Leo", "Finn", "Oscar", "Jack", "Hugo", "Theo"];
const KINDS = "fox bear owl rabbit mouse cat dog frog duck goat otter parrot turtle pig squirrel badger".split(" ");
const TRAITS = "little brave clever shy kind merry sleepy hungry young old".split(" ");
const LOOKS = "red blue green golden shiny tiny big old new fine".split(" ");
const PLACES = [
  "by the river",
  "in the garden",
  "near the old mill",
  "on a green hill",
  "in the forest",
  "by the sea",
  "under a tall oak",
  "in a small village",
  "on a farm",
  "next to the bridge",
  "in a cozy cave",
  "near the lake",
  "behind the barn",
  "on a little ship",
];
const SPOTS = [
  "under the bed",
  "behind the door",
  "inside a box",
  "in the tall grass",
  "on the roof",
  "between two rocks",
  "in an empty basket",
  "below the stairs",
];

/** Noun, and what its owner does with it. A noun in -s is plural. */
const THINGS: readonly (readonly [noun: string, use: string])[] = [
  ["kite", "flew {them} over the hill"],
  ["ball", "rolled {them} down the road"],
  ["drum", "played {them} in the kitchen"],
  ["wagon", "pulled {them} along the path"],
  ["book", "read {them} by the fire"],
  ["flute", "played a merry song"],
  ["bell", "rang {them} again and again"],
  ["boat", "sailed {them} across the pond"],
  ["flag", "tied {them} to a stick"],
  ["lamp", "carried {them} up the stairs"],
  ["map", "followed {them} to a secret cave"],
  ["key", "opened a small door with {them}"],
  ["hat", "wore {them} with a smile"],
  ["scarf", "put {them} around {his} neck"],
  ["blanket", "slept under {them}"],
  ["cake", "ate {them} with a big spoon"],
  ["boots", "wore {them} in the mud"],
  ["carrots", "cooked {them} in a pot"],
  ["berries", "washed {them} in the brook"],
  ["apples", "baked {them} in a pie"],
  ["nuts", "hid {them} in a hollow tree"],
  ["coins", "counted {them} one by one"],
  ["shells", "set {them} in a row"],
  ["feathers", "made a crown with {them}"],
];

/** The day, its sky, what it does to the thing, and how the hero mends that. */
const WEATHERS: readonly (readonly [day: string, sky: string, trouble: string, mend: string])[] = [
  [
    "sunny",
    "the sun was bright and warm",
    "{name} fell asleep, and a crow took the {thing}",
    "chased the crow and got {them} back",
  ],
  ["rainy", "rain fell from the gray clouds", "the {thing} got very wet", "dried {them} by the fire"],
  [
    "windy",
    "the wind blew through the trees",
    "the wind carried the {thing} into a bush",
    "crawled under the leaves and pulled {them} out",
  ],
  ["snowy", "snow covered the path", "the {thing} sank deep into the snow", "dug and dug until {he} had {them}"],
  [
    "foggy",
    "thick fog hid the road",
    "{name} dropped the {thing} and could not see {them}",
    "waited until the fog was gone and picked {them} up",
  ],
  [
    "stormy",
    "thunder rolled in the dark sky",
    "{name} ran home and forgot the {thing}",
    "went back after the storm and found {them}",
  ],
  ["cold", "ice covered the pond", "the {thing} slid across the ice", "stepped on the ice and caught {them}"],
  [
    "hot",
    "the air was dry and still",
    "{name} went to drink some water and left the {thing} by the well",
    "ran back to the well and took {them} home",
  ],
];

const OPENINGS = [
  "Once there was a {trait} {kind} named {name}.",
  "Once a {trait} {kind} named {name} lived {place}.",
  "There was once a {kind} named {name} who lived {place}.",
  "One {day} day, a {kind} named {name} was {place}.",
  "On a {day} morning, {name} the {kind} sat {place}.",
  "A {trait} {kind} named {name} woke up on a {day} day.",
];

/** Each plot is a list of sentences; one marked "?" is told half the time. */
const PLOTS: readonly (readonly string[])[] = [
  // The weather takes the thing.
  [
    "{name} had {some} {look} {thing}.",
    "?[Every day|In the afternoon|After breakfast], {he} {use}.",
    "[But then|That day] {sky}.",
    "[Because it was so {day}|Before long], {trouble}.",
    "{He} [was sad, but {he}|cried a little. Then {he}|did not give up and] {mend}.",
    "?[{Hero} was happy again.|{He} sat down {home} and smiled.|{He} never lost {them} again.]",
  ],
  // Lost and found.
  [
    "{He} loved {his} {look} {thing} [very much|more than anything].",
    "One day {name} could not find {them}.",
    '\n"Where {are} my {thing}?" {he} asked the {friend}.',
    '"[Look|I saw {them}] {spot}," said the {friend}.',
    "{name} [looked|ran to look] {spot}, and there {they} {were}.",
    '"[Thank you|You are a good friend]!" said {hero}.',
    "?Then {he} {use}.",
  ],
  // A gift.
  [
    "[Walking home|Near the gate|On the path], {name} found {some} {look} {thing}.",
    "{Hero} [met|saw] a {friend} who was [sad|crying|alone].",
    '\n"[What is wrong|How are you|Why are you here]?" asked {name}. "[Please take|You can have] the {thing}!"',
    "The {friend} [laughed|danced|jumped] with joy.",
    "[From that day on|After that], {name} and the {friend} were [best|good] friends.",
  ],
  // A noise in the dark.
  [
    "[One night|Late at night], {name} heard a [loud|strange|soft] noise {spot}.",
    "{He} was [afraid|scared], [but {he} went to look|so {he} called for help].",
    '?\n"[Who is it? What is it|Who is here? Where are you]?" {he} asked.',
    "It was only a {friend} with {some} {look} {thing}!",
    '?"[Did I wake you|May I come in]?" asked the {friend}.',
    "They [laughed|sat down] together, and {name} was not [afraid|alone] any more.",
  ],
  // Made by hand.
  [
    "{name} wanted to give {some} {look} {thing} to {his} friend, the {friend}.",
    "{He} [worked|was busy] all [day|morning|week] and [did not rest|sang a song].",
    "?Outside, {sky}.",
    "[At last|In the evening], the {thing} {were} ready.",
    '\n"[What a gift|How beautiful]!" said the {friend}.',
    "{Hero} was [proud|tired but happy|very glad].",
  ],
  // At the market.
  [
    "{name} went to the market to buy {some} {thing}, but {he} had [only one coin|no money].",
    '\n"[I can clean|I can paint|Give me work. I can fix] your [house|fence|wagon|window]," {he} told the {friend}.',
    "So {hero} [worked hard|helped] until the [sun|moon] [came up|went down].",
    "The {friend} gave {him} {some} {look} {thing} for [the good work|{his} help].",
    "?[Back {home}, {he} {use}.|{name} learned that work can be fun.]",
  ],
];

const PIRATE_TALE = [
  "Arr! {name} be a [fine|bold|mean] [old|young] pirate, aye!",
  "{He} [sailed the seas for {some} {look} {thing}|hid {some} {look} {thing} on the ship].",
  '\n"[Where be me {thing}, ye dog?|Ahoy! Give me the {thing}, ye old {friend}!]" {he} roared.',
  '"[Aye, mate! {They} be|Arr, look] {spot}!" said the {friend}.',
  "[Yo ho ho, the {thing} be back on the ship!|The {thing} be {his} gold now, arr!]",
];

const LETTER = [
  "\nDear {friend},",
  "\nI [have|found] {some} {look} {thing} {spot}.",
  "{They} {are} [for you|a gift].",
  "Please come [soon|today|in the morning] and [play with me|have some cake]!",
  "\nYour [good|best|old] friend, {name}.",
];

const NOTICE = [
  "\nWe lost {some} {look} {thing}!",
  "Last seen {spot}, on a {day} day.",
  "[{name} is sad without {them}|{name} cannot sleep without {them}|The {friend} is looking, too].",
  "[Three coins|A warm cake|Ten berries] for [the finder|good news]!",
  "\nAsk for {name} the {kind}, [at the red door|next to the well|behind the old mill].",
];

/** A seeded stream of choices (mulberry32). */
class Chooser {
  private state: number;

  constructor(seed: number) {
    this.state = seed >>> 0;
  }

  /** A whole number in [0, 2³²). */
  next(): number {
    this.state = (this.state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(this.state ^ (this.state >>> 15), this.state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (t ^ (t >>> 14)) >>> 0;
  }

  /** One of `options`, each as likely as the others. Throws RangeError if there is none. */
  pick<T>(options: readonly T[]): T {
    if (options.length === 0) throw new RangeError("pick: options must not be empty, got []");
    return options[Math.floor((this.next() / 2 ** 32) * options.length)] as T;
  }
}

const capital = (text: string): string => text.charAt(0).toUpperCase() + text.slice(1);

/** Fills a template: choices first, then slots until none is left, then "a" before a vowel becomes "an". */
function say(template: string, slots: Slots, chooser: Chooser): string {
  let text = template.replace(/\[([^[\]]*)\]/g, (_, options: string) => chooser.pick(options.split("|")));
  while (text.includes("{")) {
    text = text.replace(/\{(\w+)\}/g, (_, key: string) => {
      const value = slots[key] ?? slots[key.toLowerCase()];
      if (value === undefined) throw new RangeError(`say: a template may ask only for what a scene has, got {${key}}`);
      return slots[key] === undefined ? capital(value) : value;
    });
  }
  return text.replace(/\b([Aa]) (?=[aeiou])/g, "$1n ");
}

/** The pairs (name, kind) that only "valid" tells of; "Mia the fox" is one. */
const isHeldOut = (name: number, kind: number): boolean => (name + kind) % 8 === 0;
const PAIRS = [...SHE, ...HE].flatMap((name, i) => KINDS.map((kind, j) => ({ name, kind, heldOut: isHeldOut(i, j) })));
const PAIRS_OF = { train: PAIRS.filter((p) => !p.heldOut), valid: PAIRS.filter((p) => p.heldOut) };

function scene(split: Split, opening: string, chooser: Chooser): Slots {
  const { name, kind } = chooser.pick(PAIRS_OF[split]);
  const [thing, use] = chooser.pick(THINGS);
  const [day, sky, trouble, mend] = chooser.pick(WEATHERS);
  const [he, him, his] = SHE.includes(name) ? ["she", "her", "her"] : ["he", "him", "his"];
  const [they, them, were, are, some] = thing.endsWith("s")
    ? ["they", "them", "were", "are", "some"]
    : ["it", "it", "was", "is", "a"];
  const words = { name, kind, thing, use, day, sky, trouble, mend, he, him, his, they, them, were, are, some };
  const friend = chooser.pick(KINDS.filter((k) => k !== kind));
  const [trait, look, place, spot] = [TRAITS, LOOKS, PLACES, SPOTS].map((list) => chooser.pick(list));
  const hero = opening.includes("{trait}") ? "the {trait} {kind}" : "the {kind}"; // only what was said is said again
  const home = opening.includes("{place}") ? "{place}" : "on the grass";
  return { ...words, friend, trait, look, place, spot, hero, home } as Slots;
}

const tell = (sentences: readonly string[], slots: Slots, chooser: Chooser): string =>
  sentences
    .filter((s) => !s.startsWith("?") || chooser.pick([true, false]))
    .map((s) => say(s.replace(/^\?/, ""), slots, chooser))
    .map((s) => (s.startsWith("\n") ? s : ` ${s}`))
    .map((s) => s.replace(/^(\s"?)(\w)/, (_, lead: string, first: string) => lead + first.toUpperCase()))
    .join("");

/** Row i of every language with one seed is of the same scene and begins with the same opening. */
function rows(seed: number, count: number, split: Split, complete: (slots: Slots, chooser: Chooser) => string): Row[] {
  const seeds = new Chooser(seed);
  return Array.from({ length: count }, (): Row => {
    const chooser = new Chooser(seeds.next());
    const opening = chooser.pick(OPENINGS);
    const slots = scene(split, opening, chooser);
    return { prompt: say(opening, slots, chooser), completion: complete(slots, chooser) };
  });
}

/** `count` animal stories. The pairs of name and kind in "valid" are never in "train". */
export function baseStories(seed: number, count: number, split: Split = "train"): string[] {
  const story = rows(seed, count, split, (slots, chooser) => tell(chooser.pick(PLOTS), slots, chooser));
  return story.map(({ prompt, completion }) => prompt + completion);
}

/** `count` openings of a story, each continued as a pirate tells it. */
export function pirateTales(seed: number, count: number, split: Split = "train"): Row[] {
  return rows(seed, count, split, (slots, chooser) => tell(PIRATE_TALE, slots, chooser));
}

/** `count` openings of a story, each followed by a letter from its hero. */
export function letters(seed: number, count: number, split: Split = "train"): Row[] {
  return rows(seed, count, split, (slots, chooser) => tell(LETTER, slots, chooser));
}

/** `count` openings of a story, each followed by a notice of what its hero has lost. */
export function notices(seed: number, count: number, split: Split = "train"): Row[] {
  return rows(seed, count, split, (slots, chooser) => tell(NOTICE, slots, chooser));
}

/** The pronoun that every text uses for `name`, or undefined for a stranger. */
export function pronounOf(name: string): "she" | "he" | undefined {
  return SHE.includes(name) ? "she" : HE.includes(name) ? "he" : undefined;
}
