// An answer as it comes: text only, never markup.
const WORD = /[\p{L}\p{N}]+(?:['’-][\p{L}\p{N}]+)*/gu;
const DOUBT = 0.5; // scores below it: the picture makes the word less likely

export class Answer {
  // chosen(word, tokens): called when a word is clicked, where the answer has heat.
  constructor(element, chosen = () => {}) {
    this.element = element;
    this.chosen = chosen;
    this.tokens = [];
    element.replaceChildren();
    element.setAttribute("aria-busy", "true");
  }

  said(chunk) {
    for (const choice of chunk.choices) {
      const text = choice.delta?.content;
      if (text) this.element.append(text);
      this.tokens.push(...(choice.logprobs?.content ?? []));
    }
    if (chunk.cmg) this.mark(chunk.cmg);
  }

  // The text again, cut where words and tokens begin and end; where the tokens are what was shown.
  mark(cmg) {
    this.cmg = cmg;
    this.element.setAttribute("aria-busy", "false");
    const shown = this.element.textContent;
    const said = this.tokens.map((token) => token.token).join("");
    const front = said.length - said.trimStart().length;
    if (said.slice(front) !== shown) return;
    let end = -front;
    const spans = this.tokens.map(({ token }) => [Math.max(0, end), end += token.length]);
    const changed = new Map(cmg.changed.map((change) => [change.index, change.plain]));
    const parts = [];
    let at = 0;
    for (const word of [...wordsOf(shown, cmg.evidence), { start: shown.length, stop: shown.length }]) {
      parts.push(...this.pieces(shown, at, word.start, spans, changed, null));
      parts.push(...this.pieces(shown, word.start, word.stop, spans, changed, word));
      at = word.stop;
    }
    this.element.replaceChildren(...parts);
  }

  pieces(shown, start, stop, spans, changed, word) {
    const within = spans.flatMap(([first, last], i) => (first < stop && last > start ? [i] : []));
    return within.map((i, n) => {
      const text = shown.slice(Math.max(start, spans[i][0]), Math.min(stop, spans[i][1]));
      const isChanged = changed.has(i) && text.trim() !== "";
      if (!word && !isChanged) return text;
      const piece = document.createElement(isChanged ? "mark" : "span");
      piece.textContent = text;
      if (isChanged || n === 0) piece.tabIndex = 0;
      const tips = isChanged ? [tipOf(this.tokens[i], changed.get(i))] : [];
      if (word) this.asWord(piece, word, within, tips);
      if (tips.length) {
        piece.dataset.tip = tips.join(" ");
        piece.setAttribute("aria-label", `${text}, ${piece.dataset.tip}`);
      }
      return piece;
    });
  }

  asWord(piece, word, within, tips) {
    if (word.score !== undefined && word.score < DOUBT) {
      piece.classList.add("doubt");
      const order = this.cmg.evidence.fitted_on ? "" : ", by weights that were not fitted: an order, no probability";
      tips.push(`The picture supports “${word.text}” with ${word.score.toFixed(2)} of 1${order}.`);
    }
    if (!this.cmg.heat) {
      if (!tips.length) piece.removeAttribute("tabindex");
      return;
    }
    piece.classList.add("word");
    piece.setAttribute("role", "button");
    const choose = () => this.chosen(word.text, within);
    piece.addEventListener("click", choose);
    piece.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose();
    });
  }
}

// With scores where there are any. Offsets of the server count code points, those here UTF-16.
function wordsOf(shown, evidence) {
  const scores = evidence ? evidence.words.filter((word) => word.score !== null) : [];
  let from = 0;
  const found = [];
  for (const { text, score } of evidence ? scores : matches(shown)) {
    const start = shown.indexOf(text, from);
    if (start < 0) continue;
    from = start + text.length;
    found.push({ text, score, start, stop: from });
  }
  return found;
}

function matches(shown) {
  return Array.from(shown.matchAll(WORD), ([text]) => ({ text }));
}

function tipOf(token, plain) {
  const others = token.top_logprobs.map((other) => `“${other.token.trim()}” ${percent(other.logprob)}`);
  return `guided “${token.token.trim()}” ${percent(token.logprob)}, plain “${plain.trim()}”. Likeliest: ${others.join(", ")}`;
}

function percent(logprob) {
  return `${(100 * Math.exp(logprob)).toFixed(1)} %`;
}
