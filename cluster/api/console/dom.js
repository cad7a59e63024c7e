// Small helpers. Elements are made once and their texts changed, so that what is selected, focused
// or scrolled stays so while figures come in every second.

export const byId = (id) => document.getElementById(id);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// The children of `parent`, so many of them, made by `make` where there are too few.
export function resized(parent, count, make) {
  while (parent.children.length > count) parent.lastElementChild.remove();
  while (parent.children.length < count) parent.append(make());
  return [...parent.children];
}

// Rows of texts as the body of a table.
export function setRows(body, rows) {
  const lines = resized(body, rows.length, () => element("tr"));
  rows.forEach((cells, index) => {
    const made = resized(lines[index], cells.length, () => element("td"));
    cells.forEach((text, column) => setText(made[column], text));
  });
}

// [name, text] pairs as a <dl>.
export function setFacts(list, facts) {
  const parts = resized(list, 2 * facts.length, () =>
    element(list.children.length % 2 ? "dd" : "dt"));
  facts.forEach(([name, text], index) => {
    setText(parts[2 * index], name);
    setText(parts[2 * index + 1], text);
  });
}

export const fixed = (value, digits) =>
  value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
