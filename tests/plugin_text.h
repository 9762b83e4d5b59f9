// Prose that tests of real models read: about 800 tokens of SmolLM2's.
#pragma once

namespace tqtest {

inline constexpr const char* kProse =
    "The lighthouse stood at the end of a long spit of gravel, and in winter the road to it was under water twice a "
    "day. Martha "
    "had kept the lamp for eleven years. She knew the sound each wind made in the gallery rails, and she could tell "
    "from the "
    "kitchen whether the glass needed cleaning. When the harbour board wrote that the light would be run by a machine, "
    "she read "
    "the letter twice, put it under the clock, and went up to trim the wick as she did every evening. The machine "
    "arrived in "
    "March on a flat cart. It was a grey box no larger than a suitcase, with a row of small lamps and a paper drum "
    "that turned "
    "once an hour. Two men bolted it to the floor and showed her how the drum recorded the weather. For a month both "
    "of them "
    "kept the light, the woman and the box, and neither made a mistake. In April a fog came in that lasted nine days. "
    "On the "
    "third night a fishing boat lost its rudder and drifted toward the spit, and because the box could measure only "
    "what it "
    "was built to measure, it wrote a line on its drum and did nothing else. Martha heard the engine stop. She lit the "
    "old "
    "horn, which nobody had told her to remove, and blew it every minute until the boat answered. Afterwards the board "
    "asked "
    "her what signal had made her act. She said there had been no signal, only a silence in a place where there should "
    "have "
    "been a noise, and that a person who listens for eleven years learns to hear what is missing."
    " The pilots' association wrote to the board as well, and asked that the horn be kept. The board answered that the "
    "box would be given an ear. In June an engineer came from the city with a brass trumpet and a roll of wire. He "
    "fastened the trumpet under the gallery and ran the wire down through the stair to the grey box, which now drew "
    "two lines instead of one. Martha cooked for him and showed him the rock pools. He told her that in the city there "
    "were machines that could tell a tenor from a bass, but none that could tell a tenor who was tired from one who "
    "was "
    "sad. She asked what use it would be if they could. He thought about it all through supper and said at last that "
    "he "
    "did not know, but that he would feel less foolish when he talked to them. When he left he gave her the spare "
    "drum. "
    "She turned it over and used the clean side for her own notes: the hour the gulls came back, the colour of the "
    "water "
    "over the bar, how long the iron of the ladder kept the heat after the sun had gone. By autumn the paper was full, "
    "and she began another. Nobody ever asked to see it. Years later, when the light was closed and the box was shown "
    "in "
    "a museum with a card that gave its weight and the name of its maker, a visitor from the coast stood before it for "
    "a "
    "long while and then asked the attendant where the other record was, the one on the back.";

} // namespace tqtest
