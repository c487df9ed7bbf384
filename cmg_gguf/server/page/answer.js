// An answer as it comes: text only, never markup.
export class Answer {
  constructor(element) {
    this.element = element;
    this.tokens = [];
    element.replaceChildren();
  }

  said(chunk) {
    for (const choice of chunk.choices) {
      const text = choice.delta?.content;
      if (text) this.element.append(text);
      this.tokens.push(...(choice.logprobs?.content ?? []));
    }
    if (chunk.cmg) this.mark(chunk.cmg);
  }

  // The tokens again, with those that guidance changed marked; where they are the text that was shown.
  mark(cmg) {
    this.cmg = cmg;
    const shown = this.element.textContent;
    const said = this.tokens.map((token) => token.token).join("");
    const front = said.length - said.trimStart().length;
    if (!cmg.n_changed || said.slice(front) !== shown) return;
    const changed = new Map(cmg.changed.map((change) => [change.index, change.plain]));
    let cut = front;
    const parts = this.tokens.map((token, i) => {
      const text = token.token.slice(Math.min(cut, token.token.length));
      cut = Math.max(0, cut - token.token.length);
      if (!changed.has(i)) return [text];
      const word = text.trimStart() || text;
      return [text.slice(0, text.length - word.length), markOf(word, token, changed.get(i))];
    });
    this.element.replaceChildren(...parts.flat());
  }
}

function markOf(text, token, plain) {
  const mark = document.createElement("mark");
  mark.textContent = text;
  mark.tabIndex = 0;
  const others = token.top_logprobs.map((other) => `“${other.token}” ${percent(other.logprob)}`);
  mark.dataset.tip = `guided “${token.token}” ${percent(token.logprob)}, plain “${plain}”. Likeliest: ${others.join(", ")}`;
  mark.setAttribute("aria-label", `${text}, ${mark.dataset.tip}`);
  return mark;
}

function percent(logprob) {
  return `${(100 * Math.exp(logprob)).toFixed(1)} %`;
}
