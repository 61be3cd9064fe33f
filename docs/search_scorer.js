// Orders what the search finds. Of pages that hold all words asked for Sphinx knows no better than the
// alphabet, so: those first whose title or heading has the words, then what to do before why, and that before
// the studies; the changelog and names in the code last.
var Scorer = {
  objNameMatch: 6, objPartialMatch: 1, objPrio: { 0: 0, 1: 0, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,

  score: ([page, title, , , score, , kind]) => {
    const asked = new URLSearchParams(location.search).get("q") || "";
    const words = asked.toLowerCase().split(/\s+/).filter((word) => word.length > 2);
    const named = words.filter((word) => title.toLowerCase().includes(word)).length;
    const rooms = [["docs/howto/", 4], ["docs/", 2], ["experiments/", 0], ["", -8]];
    const [, room] = rooms.find(([start]) => page.startsWith(start));
    const whole = kind === "title" || kind === "index" ? 10 : 0; // the words together, in a heading
    return score + room + (kind === "object" ? -4 : whole + (words.length ? (10 * named) / words.length : 0));
  },
};
