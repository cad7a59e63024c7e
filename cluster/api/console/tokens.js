// An answer as it comes: its tokens by where they come from, and how fast they come.

import { element, fixed, setFacts } from "./dom.js";

const TITLES = {
  accepted: "accepted: a guess of the drafter",
  recovered: "recovered: the target's own, where it rejected a guess",
  bonus: "bonus: the target's own, behind a whole accepted block",
  target: "target: plain decoding",
};

export class Answer {
  constructor(text, figures) {
    this._text = text;
    this._figures = figures;
    this.clear("");
  }

  clear(prompt) {
    this._text.replaceChildren();
    if (prompt) this._text.append(element("span", { class: "prompt" }, prompt));
    setFacts(this._figures, []);
    this.tokenIds = [];
    this.finishReason = null;
    this._counts = {};
    this._stats = null;
    this._started = performance.now();
    this._firstAt = null;
    this._lastAt = null;
    this._numFirst = 0;
  }

  // Tokens per second behind the first piece, whose time is the prompt's; null: not known yet.
  get rate() {
    const seconds = (this._lastAt - this._firstAt) / 1000;
    return seconds > 0 ? (this.tokenIds.length - this._numFirst) / seconds : null;
  }

  add(event) {
    const choice = event.choices[0];
    if (event.usage) this._stats = event.usage.speculation;
    if (choice) {
      this._addTokens(choice.token_ids ?? []);
      this._addText(choice.text ?? choice.delta?.content ?? "", choice);
      this.finishReason = choice.finish_reason ?? this.finishReason;
    }
    this.showFigures();
  }

  _addTokens(tokenIds) {
    if (!tokenIds.length) return;
    const now = performance.now();
    if (this._firstAt === null) {
      this._firstAt = now;
      this._numFirst = tokenIds.length;
    }
    this._lastAt = now;
    this.tokenIds.push(...tokenIds);
  }

  // Lengths are in characters, and a character may be two units of a JavaScript string. A token
  // whose text is not final yet has length 0; what is held back at the end belongs to the last one.
  _addText(text, choice) {
    const isAtEnd =
      this._text.scrollHeight - this._text.scrollTop - this._text.clientHeight < 8;
    const characters = [...text];
    const sources = choice.token_sources ?? [];
    const spans = document.createDocumentFragment();
    let start = 0;
    sources.forEach((source, index) => {
      this._counts[source] = (this._counts[source] ?? 0) + 1;
      const isLast = index === sources.length - 1;
      const end = isLast ? characters.length : start + choice.text_lengths[index];
      if (end > start) {
        const title = TITLES[source] ?? source;
        const piece = characters.slice(start, end).join("");
        spans.append(element("span", { class: `token ${source}`, title }, piece));
      }
      start = end;
    });
    if (!sources.length && text) spans.append(text);
    this._text.append(spans);
    if (isAtEnd) this._text.scrollTop = this._text.scrollHeight;
  }

  showFigures() {
    const facts = [["tokens", `${this.tokenIds.length}`]];
    if (this.rate !== null) facts.push(["speed", `${fixed(this.rate, 1)} tokens/s`]);
    if (this._firstAt !== null) {
      facts.push(["first token", `${fixed(this._firstAt - this._started, 0)} ms`]);
    }
    const counts = Object.entries(this._counts).map(([source, count]) => `${count} ${source}`);
    if (counts.length) facts.push(["of these", counts.join(", ")]);
    if (this._stats?.num_drafts) {
      facts.push(["acceptance length", fixed(this._stats.acceptance_length, 2)]);
    }
    if (this.finishReason) facts.push(["ended by", this.finishReason]);
    setFacts(this._figures, facts);
  }
}
