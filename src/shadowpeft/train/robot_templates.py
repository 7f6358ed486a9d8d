"""Tables of the robot-command grammar: skills, their templates, remote requests, words for the slots.

A template list is one string, its templates separated by ``;``. In a template ``(a|b|)`` is a choice, perhaps
of nothing, and ``{room}`` is a slot for one of ``WORDS["room"]``. A template that ends in ``?`` is a whole
question; the others are orders, to which "could you ...?" or "... please" can be added.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Skill:
    """One thing the robot dog can do on its own.

    Attributes:
        description: what the robot does, one line.
        argument: name of the only argument and of its slot in the templates; None where there is none.
        templates: for each split, the ways to ask; no template is in two splits.
    """

    description: str
    argument: str | None
    templates: Mapping[str, tuple[str, ...]]


def _by_split(**lists: str) -> dict[str, tuple[str, ...]]:
    return {split: tuple(" ".join(part.split()) for part in text.split(";")) for split, text in lists.items()}


def _skill(description: str, argument: str | None = None, *, train: str, validation: str, test: str) -> Skill:
    templates = _by_split(train=train, validation=validation, test=test)
    return Skill(description=description, argument=argument, templates=templates)


def _turn(side: str) -> Skill:
    return _skill(
        f"Turns a quarter to the {side}.",
        train=f"turn {side}; turn to your {side}; make a {side} (turn|); go {side}; take a {side};"
        f"face {side}; rotate (to the|) {side}; swing (around|) to the {side}; pivot {side};"
        f"look to your {side}; steer {side}",
        validation=f"turn {side} (here|at the corner); rotate to your {side}",
        test=f"turn (yourself|) to the {side} side; take a {side} turn; make a turn to the {side}",
    )


SKILLS: dict[str, Skill] = {
    "sit": _skill(
        "Sits down on its hind legs.",
        train="""sit; sit down (here|over there|); take a seat (here|); have a seat; be seated; sit still;
        get into (a|your) sitting position; put your (bottom|backside) on the floor; sit and stay;
        go sit (in the corner|by the door); lower yourself into a sit""",
        validation="sit (nicely|quietly); sit on the (rug|mat)",
        test="sit down on the (floor|carpet|grass); move to a sitting position; take your seat (next to me|)",
    ),
    "stand": _skill(
        "Stands up on all four legs.",
        train="""stand; stand up (straight|again|); get up (on your feet|off the floor);
        rise to your feet; get (back|) on your feet; stand on (all four|your) legs; be on your feet;
        go to a standing position; stand tall; stand firmly on the ground""",
        validation="stand up on (all fours|your feet); get on all four legs",
        test="stand up and stay standing; rise up on your legs; get up into a standing position",
    ),
    "lie_down": _skill(
        "Lies down on its belly.",
        train="""lie down (here|on the floor|); lay down (here|on the rug|); lie flat (on the ground|);
        get down on your belly; put your belly on the floor; lie on your (belly|stomach); drop down flat;
        rest your belly on the ground; go lie down (on your blanket|by the sofa); get down low and flat""",
        validation="lie down (next to me|quietly); lay flat on your belly",
        test="""lie down flat on the (carpet|grass); get your belly down on the ground;
        lay down on your stomach""",
    ),
    "roll_over": _skill(
        "Rolls over its back, once.",
        train="""roll over (once|for us|); roll onto your back; roll around on the (floor|grass);
        do a roll; do a barrel roll; roll your body over; show me a roll; roll sideways;
        roll all the way over; tumble over""",
        validation="roll over on the (rug|mat); give me a roll",
        test="roll over and onto your back; show us how you roll over; do a full roll on the floor",
    ),
    "shake_hands": _skill(
        "Lifts a front paw to shake hands.",
        train="""shake hands (with me|with our guest|); give me your paw; give paw; shake my hand;
        offer (me|us) a paw; lift your paw and shake; let me shake your paw; put your paw in my hand;
        give me a handshake; hold out your paw""",
        validation="shake (paws|hands) with us; give your paw to me",
        test="give us your paw; shake hands like a gentleman; hold out a paw and shake hands",
    ),
    "stretch": _skill(
        "Stretches its body.",
        train="""stretch; stretch (out|) your (legs|back|body); have a (good|long) stretch;
        do a (morning|big) stretch; do some stretching; do your stretches; stretch yourself (out|);
        loosen up your (legs|joints); warm up your legs with a stretch; stretch like a cat""",
        validation="take a (nice|quick) stretch; stretch all four legs",
        test="stretch out your front legs; have a nice big stretch; do a bit of stretching",
    ),
    "bark": _skill(
        "Barks.",
        train="""bark; bark (loudly|softly|) at the door; give (me|us) a (loud|little|) bark; say woof;
        make a barking (sound|noise); let out a (big|) bark; bark like a real dog; let me hear you bark;
        make a woof; bark once""",
        validation="give a friendly bark; bark for (us|the kids)",
        test="let us hear a bark; bark out loud; make a loud woof sound",
    ),
    "dance": _skill(
        "Dances.",
        train="""dance; dance (for us|to the music|with me); do a (little|happy|silly) dance;
        show (me|us) your dance moves; start dancing; perform a dance; bust a move;
        move to the (music|beat); dance around the table; get your groove on""",
        validation="do your best dance; dance to this song",
        test="show us how you dance; perform a happy dance for the guests; start dancing to the beat",
    ),
    "wag_tail": _skill(
        "Wags its tail.",
        train="""wag your tail (fast|slowly|); wag that tail; shake your tail (happily|);
        move your tail from side to side; swing your tail; give (me|us) a tail wag; wiggle your tail;
        make your tail wag; show me a happy tail; wave your tail""",
        validation="wag your tail (happily|for us); make your tail wiggle",
        test="keep wagging your tail; wiggle that tail from side to side; show us a tail wag",
    ),
    "spin": _skill(
        "Spins around once.",
        train="""spin; spin around (once|quickly|); turn around in a circle; do a (quick|full|) spin;
        spin in (a circle|circles); twirl; twirl around; go round in circles; do a twirl;
        make a full turn around; whirl around; show me a spin""",
        validation="spin around in place; do a little twirl",
        test="spin in a full circle; twirl around in circles; show us your spin",
    ),
    "bow": _skill(
        "Bows, front legs low.",
        train="""bow; bow (down|) to the (audience|crowd|queen); take a bow; make a (polite|deep) bow;
        give (us|me) a bow; bow your head; bow politely; do a (nice|) bow; show respect with a bow;
        lower your head and bow""",
        validation="bow to (our|the) guests; end the show with a bow",
        test="take a deep bow; bow in front of the crowd; give the audience a polite bow",
    ),
    "beg": _skill(
        "Raises both front paws to beg.",
        train="""beg; beg for (food|a treat|a biscuit); sit up and beg; put your paws up and beg;
        do your begging trick; beg like a (puppy|hungry dog); show me how you beg;
        ask for a treat with your paws up; start begging; beg nicely; raise both front paws and beg""",
        validation="beg for (a snack|a cookie); do some begging",
        test="beg for your dinner; show us your begging trick; beg with both paws up",
    ),
    "play_dead": _skill(
        "Drops to its side and stays there.",
        train="""play dead; pretend (to be|you are) dead; act dead;
        play dead (on the floor|like in the movies); fall over and play dead; drop dead;
        lie there and play dead; do the play dead trick; do your dead dog trick; act like you are dead;
        fake your death""",
        validation="play dead (for us|for a moment); act as if you were dead",
        test="pretend that you are dead; show us the play dead trick; fall down like a dead dog",
    ),
    "come_here": _skill(
        "Comes to the speaker.",
        train="""come here; come (over|back|) to me; come over here; come closer (to me|); get over here;
        walk (over|up) to me; come to my side; come here at once; move closer to me; return to me;
        run to me""",
        validation="come here (to me|boy); come back over here",
        test="come on over here; come close to my side; run over here to me",
    ),
    "follow_me": _skill(
        "Walks behind the speaker until told otherwise.",
        train="""follow me (outside|upstairs|around|); walk (with|behind|beside) me; come along with me;
        come with me; stay (close|right) behind me; keep following me; tag along with me; stick with me;
        trail behind me; follow my (lead|footsteps)""",
        validation="follow me (downstairs|to the park); follow close behind me",
        test="follow along behind me; keep on following me (while I walk|); come along and follow me",
    ),
    "stop": _skill(
        "Stops any motion at once.",
        train="""stop; stop (moving|walking|that|it); halt; freeze; stop (immediately|at once);
        stay exactly where you are; quit moving; cease all motion; cut it out; stop what you are doing;
        halt immediately; freeze where you are""",
        validation="stop everything; halt where you are",
        test="stop all movement; freeze and stop moving; halt at once",
    ),
    "charge": _skill(
        "Returns to its dock and charges the battery.",
        train="""charge (yourself|your battery|); go (and|) charge; recharge (your battery|);
        go (back|) to your (dock|charger|charging station); plug yourself in; dock at the charger;
        fill up your battery; get some power at the dock; return to the charging (dock|station);
        power up your battery; go get charged""",
        validation="recharge yourself; head to your charger",
        test="go recharge at your dock; go and fill your battery; head back to the charging station",
    ),
    "sleep": _skill(
        "Goes into sleep mode.",
        train="""sleep; go to sleep; take a nap; have a (short|little) nap; go to (bed|sleep mode);
        enter sleep mode; get some (sleep|rest); close your eyes and sleep; fall asleep;
        switch to sleep mode; doze off; nap for a while""",
        validation="go have a nap; sleep for a while",
        test="go take a little nap; close your eyes and fall asleep; get a bit of sleep",
    ),
    "wake_up": _skill(
        "Leaves sleep mode.",
        train="""wake up; wake up (from your nap|sleepyhead); wake yourself up;
        open your eyes and wake up; stop sleeping; exit sleep mode; leave sleep mode; end your nap;
        come out of sleep mode; rise and shine; stop napping; be awake""",
        validation="wake up (slowly|from your sleep); finish your nap and wake up",
        test="wake up and open your eyes; stop napping and wake up; wake from sleep mode",
    ),
    "take_photo": _skill(
        "Takes a photo with the front camera.",
        train="""take a (photo|picture) (of me|of us|); snap a (photo|picture) (of the family|);
        shoot a photo; capture (a|this) picture; take a selfie; use your camera (to take a photo|);
        photograph (me|us|this); get a photo of this; take some pictures; click a (picture|photo)""",
        validation="take a nice photo of (everyone|the guests); snap a selfie",
        test="take one picture of all of us; use the camera and snap a photo; capture a photo of this moment",
    ),
    "turn_left": _turn("left"),
    "turn_right": _turn("right"),
    "walk_forward": _skill(
        "Walks forward a number of steps.",
        "steps",
        train="""walk forward {steps} steps; walk {steps} steps (forward|ahead); go forward {steps} steps;
        take {steps} steps (forward|ahead); move forward by {steps} steps; move {steps} steps forward;
        step forward {steps} times; go {steps} steps ahead; advance {steps} steps;
        march forward {steps} steps""",
        validation="walk ahead {steps} steps; make {steps} steps forward",
        test="""go ahead by {steps} steps; walk straight ahead for {steps} steps;
        move forward for {steps} steps""",
    ),
    "walk_backward": _skill(
        "Walks backward a number of steps.",
        "steps",
        train="""walk (backward|backwards) {steps} steps; walk {steps} steps (back|backward);
        go back {steps} steps; take {steps} steps (back|backward); move (back|backward) by {steps} steps;
        move {steps} steps back; step back {steps} times; go {steps} steps backward;
        retreat {steps} steps; back up {steps} steps; back away {steps} steps""",
        validation="walk back {steps} steps; make {steps} steps backward",
        test="back up by {steps} steps; go backward for {steps} steps; move backward for {steps} steps",
    ),
    "jump": _skill(
        "Jumps a number of times.",
        "times",
        train="""jump {times} times; jump up {times} times; do {times} jumps; hop {times} times;
        make {times} (big|high|small) jumps; leap (in the air|) {times} times;
        jump up and down {times} times; perform {times} jumps; give me {times} jumps;
        jump high {times} times; do {times} hops""",
        validation="jump on the spot {times} times; make {times} jumps",
        test="jump into the air {times} times; show me {times} high jumps; hop up and down {times} times",
    ),
    "push_ups": _skill(
        "Does a number of push-ups.",
        "times",
        train="""do {times} (push ups|pushups|push-ups); give me {times} (push ups|pushups);
        perform {times} push ups; show me {times} push ups; push yourself up {times} times;
        drop and do {times} push ups; drop and give me {times} push ups; work out with {times} push ups;
        complete {times} pushups; make {times} push ups""",
        validation="do {times} quick push ups; drop down for {times} push ups",
        test="""show us {times} strong push ups; do a set of {times} push ups;
        get down and do {times} push ups""",
    ),
    "wait": _skill(
        "Waits a number of seconds before the next command.",
        "seconds",
        train="""wait {seconds} seconds; wait for {seconds} seconds;
        wait (here|there) for {seconds} seconds; pause for {seconds} seconds;
        hold on for {seconds} seconds; stay (here|put) for {seconds} seconds;
        take a {seconds} second (break|pause); pause {seconds} seconds; hang on {seconds} seconds;
        do nothing for {seconds} seconds; wait about {seconds} seconds""",
        validation="wait where you are for {seconds} seconds; hold on {seconds} seconds",
        test="""wait another {seconds} seconds; pause and wait for {seconds} seconds;
        stay there and wait {seconds} seconds""",
    ),
    "fetch": _skill(
        "Brings an object to the speaker.",
        "object",
        train="""fetch the {object}; fetch me the {object}; bring me (the|my) {object};
        get (me|) (the|my) {object}; go get the {object}; pick up the {object} (and bring it here|);
        go fetch my {object}; retrieve the {object}; grab the {object} (for me|);
        carry the {object} to me; bring the {object} (here|back|to me)""",
        validation="fetch that {object}; bring over the {object}",
        test="go and fetch the {object} (for me|); bring my {object} back to me; run and get the {object}",
    ),
    "kick": _skill(
        "Kicks an object.",
        "object",
        train="""kick the {object}; kick (my|that) {object}; give the {object} a (good|hard|) kick;
        kick the {object} (away|to me|across the room); hit the {object} with your (paw|foot);
        push the {object} with your foot; kick at the {object}; strike the {object} with a kick;
        go kick the {object}; knock the {object} away""",
        validation="kick the {object} (gently|hard); give that {object} a kick",
        test="""kick the {object} over to me; give the {object} one strong kick;
        go and kick the {object} with your foot""",
    ),
    "go_to": _skill(
        "Goes to a room.",
        "room",
        train="""go to the {room}; walk to the {room}; go (into|inside) the {room}; run to the {room};
        move to the {room}; head to the {room}; go over to the {room}; visit the {room}; enter the {room};
        make your way to the {room}; get to the {room}""",
        validation="go straight to the {room}; walk into the {room}",
        test="head over to the {room}; walk over to the {room}; run into the {room}",
    ),
    "guard": _skill(
        "Guards a room and reports what moves there.",
        "room",
        train="""guard the {room}; watch (over|) the {room}; keep watch (in|over) the {room};
        protect the {room}; keep guard (in|of) the {room}; stand guard in the {room}; patrol the {room};
        keep an eye on the {room}; be on guard in the {room}; secure the {room}; go guard the {room}""",
        validation="guard the {room} (tonight|for us); watch the {room} carefully",
        test="keep the {room} guarded; patrol and protect the {room}; stand watch over the {room}",
    ),
    "find": _skill(
        "Searches the house for a person.",
        "name",
        train="""find {name}; look for {name}; go find {name}; search for {name};
        go (and|) look for {name}; locate {name}; find out where {name} is; go search for {name};
        see where {name} is; find my friend {name}; track down {name}; hunt for {name}""",
        validation="find {name} (in the house|for me); try to find {name}",
        test="go and find {name} (for us|); look around for {name}; search the house for {name}",
    ),
    "greet": _skill(
        "Greets a person by name.",
        "name",
        train="""greet {name}; say (hello|hi) to {name}; welcome {name}; say good morning to {name};
        go greet {name}; give {name} a (warm|friendly) welcome; wish {name} a good day;
        meet and greet {name}; go say hi to {name}; wave (hello|) to {name}; greet my friend {name}""",
        validation="greet {name} (nicely|politely); say hello and welcome to {name}",
        test="go and say hello to {name}; give {name} a friendly hello; greet our guest {name}",
    ),
    "set_light": _skill(
        "Sets the color of its lights.",
        "color",
        train="""set (your|the) light to {color}; turn (your|the) light {color};
        make your (light|eyes) {color}; change the (light|lights) to {color}; glow {color};
        show a {color} light; light up (in|) {color}; switch (your|the) light to {color}; shine {color};
        turn your eyes {color}; put on a {color} light""",
        validation="set the lights to {color}; light up your eyes in {color}",
        test="change your light to {color}; make the light shine {color}; switch on a {color} light",
    ),
}

# General questions, and requests close to the skills in words ("paint the kitchen red") that no skill serves.
REMOTE_TEMPLATES: dict[str, tuple[str, ...]] = _by_split(
    train="""
    what is the capital of {country}?; how many people live in {country}?; where is {country}?;
    what language do they speak in {country}?; what is the weather (like|) in {city} (today|tomorrow)?;
    what time is it in {city}?; tell me about the history of {city}; plan a (trip|weekend) to {city};
    book a (flight|hotel|train ticket) to {city}; how do I cook {dish}?; give me a recipe for {dish};
    order {dish} for dinner; is {dish} healthy?; how many calories are in {dish}?; who was {figure}?;
    when was {figure} born?; tell me about the life of {figure}; why is {figure} famous?;
    what is {number} plus {number}?; what is {number} times {number}?; calculate {number} divided by {number};
    what is the square root of {number}?; solve {number} plus {number}; translate {word} into {language};
    how do you say {word} in {language}?; teach me some {language}; write (me|) a poem about {subject};
    write a (short|) story about {subject}; write an essay on {subject}; tell me a joke (about {subject}|);
    explain {subject} (to a child|in simple words|); summarize the latest research on {subject};
    what do you think about {subject}?; recommend a (book|film|podcast) about {subject};
    why is {subject} important?; what is the latest news (about {subject}|)?;
    who won the {sport} game (last night|yesterday)?; explain the rules of {sport};
    what is the best {device} to buy?; compare a {device} with a cheaper one; how much does a {device} cost?;
    how do I repair my {device}?; order a new {device} online; who invented the {device}?;
    how long does a {animal} live?; how fast can a {animal} run?; what does a {animal} eat?;
    tell me a fact about a {animal}; what is the meaning of {word}?; spell the word {word};
    what rhymes with {word}?; send (an email|a message) to {name}; call {name} on the phone;
    remind me to call {name} (tomorrow|); when is the birthday of {name}?; write a birthday card for {name};
    set an alarm for {hour} (am|pm); what is on my calendar (today|tomorrow)?;
    schedule a meeting for {hour} pm; play some (jazz|rock|classical) music; sing a song about {subject};
    what is the meaning of life?; how do I write a (resume|cover letter|business plan)?;
    help me with my (maths|history|physics) homework; write a (python|javascript) program that sorts a list;
    convert {number} (dollars|pounds) to (euros|yen); how tall is (mount everest|the eiffel tower)?;
    turn on the (washing machine|oven|radio); clean the windows in the {room}; paint the {room} {color};
    which colors go well with {color}?; make me a (sandwich|coffee|cup of tea);
    drive me to (work|the airport|school); do my (taxes|laundry|dishes);
    give me advice about (my career|saving money|losing weight); what should I (wear|eat|cook|watch) tonight?;
    how much does a new {object} cost?; find me a (restaurant|hotel|pharmacy) in {city}""",
    validation="""
    what is the population of {country}?; will it rain in {city} tomorrow?; what is a good recipe for {dish}?;
    tell me who {figure} was; what is {number} minus {number}?; translate {word} to {language};
    write a song about {subject}; tell me a funny joke; how heavy is a {animal}?;
    which {device} should I buy?; send a text message to {name}; what are the rules of {sport}?;
    make me a (salad|hot chocolate); set an alarm for tomorrow at {hour} am""",
    test="""
    what is the largest city in {country}?; what is the currency of {country}?;
    tell me the capital city of {country}; how is the weather in {city} this weekend?;
    find me a cheap flight to {city}; how do I make {dish} at home?; what ingredients do I need for {dish}?;
    what was {figure} famous for?; tell me something about {figure}; how much is {number} times {number}?;
    calculate {number} plus {number}; what is {number} divided by {number}?;
    what is the {language} word for {word}?; translate the word {word} into {language};
    write me a short poem about {subject}; write a letter about {subject}; tell me a joke about a {animal};
    explain how {subject} can change the world; give me a summary of the news about {subject};
    what are the best books about {subject}?; who won the {sport} world cup?;
    compare the two best {device} models; what is the price of a new {device}?; where does a {animal} live?;
    what does the word {word} mean?; send {name} an email about {subject};
    what meetings do I have (today|tomorrow)?; play a (jazz|rock) song; help me write a (resume|cover letter);
    clean the (dishes|windows)""",
)

# The words for each slot, separated by commas.
_WORDS = dict(
    steps="2, 3, 4, 5, 6, 7, 8, 9",
    times="2, 3, 4, 5, 6, 7, 8, 9",
    seconds="5, 10, 15, 20, 30, 40, 45, 60",
    object="ball, stick, bone, shoe, sock, bottle, rope, toy, cup, box",
    room="kitchen, bedroom, bathroom, garage, hallway, garden, office, basement",
    name="Anna, Ben, Carlos, Diana, Emma, Felix, Grace, Henry, Julia, Lucas, Maria, Oscar",
    color="red, green, blue, yellow, purple, orange, white, pink",
    country="Peru, Japan, Norway, Kenya, Canada, Portugal, Vietnam, Egypt, Chile, Finland",
    city="Paris, Tokyo, Berlin, Toronto, Madrid, Cairo, Sydney, Chicago, Lisbon, Mumbai",
    dish="rice, lasagna, pancakes, sushi, chili, tomato soup, fried eggs, curry, pizza, risotto",
    figure="Albert Einstein, Marie Curie, Mozart, Cleopatra, Isaac Newton, Frida Kahlo, Shakespeare, "
    "Ada Lovelace, Napoleon, Nelson Mandela",
    number="12, 17, 24, 38, 45, 56, 64, 81, 99, 120, 144, 250",
    language="French, German, Spanish, Italian, Japanese, Turkish, Dutch, Swedish",
    word="friend, water, love, house, freedom, river, beauty, courage, bread, winter",
    subject="the ocean, black holes, democracy, friendship, quantum physics, the moon, climate change, "
    "electricity, ancient Rome, artificial intelligence, volcanoes, autumn",
    sport="football, tennis, basketball, hockey, rugby, cricket, baseball, volleyball",
    device="phone, laptop, camera, tablet, printer, television, watch, vacuum cleaner",
    animal="penguin, whale, tiger, spider, horse, bat, shark, giraffe, turtle, cheetah",
    hour="5, 6, 7, 8, 9, 10",
)
WORDS: dict[str, tuple[str, ...]] = {slot: tuple(words.split(", ")) for slot, words in _WORDS.items()}

# What goes before any request; the empty ones keep plain requests common.
WAKE_WORDS = (
    "", "", "", "hey buddy, ", "buddy, ", "robot, ", "hey robot, ", "ok robot, ", "hello robot, ",
    "hey dog, ", "hey there, ", "excuse me, ", "listen, ", "um, ", "well, ", "alright, ",
)  # fmt: skip

# What goes around an order.
CARRIERS = (
    "{}", "{}", "{}", "please {}", "{} please", "{}, please", "{} now", "now {}", "just {}", "{}, thanks",
    "can you {}?", "could you {}?", "would you {}?", "could you please {}?", "I want you to {}",
    "I would like you to {}", "go ahead and {}", "it is time to {}", "you should {}", "I need you to {}",
)  # fmt: skip
