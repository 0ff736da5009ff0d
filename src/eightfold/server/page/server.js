// ---- The server.

let models = [];  // what it serves

const chosenModel = () => models.find((each) => each.id === $("which").value) || models[0] || {};
const nameOfModel = () => chosenModel().id || "the model";
const format = (count) => count.toLocaleString("en-US");

// Why something did not work, in words for the person.
class Problem extends Error {
  constructor(text, needsKey = false) {
    super(text);
    this.needsKey = needsKey;
  }
}

function headers() {
  const found = { "Content-Type": "application/json" }, key = $("key").value.trim();
  if (key) found.Authorization = "Bearer " + key.replace(/[^\x20-\x7e]/g, "");
  return found;
}

async function call(path, content, signal) {
  let response;
  try {
    response = await fetch(path, content === undefined
      ? { headers: headers(), signal }
      : { method: "POST", headers: headers(), body: JSON.stringify(content), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached. Is it still running, and are you online?");
  }
  if (!response.ok) throw await problemOf(response);
  return response;
}

async function problemOf(response) {
  let error = {};
  try { error = (await response.json()).error || {}; } catch { /* no JSON: a proxy, perhaps */ }
  const said = error.message || "HTTP " + response.status, wait = Number(response.headers.get("Retry-After"));
  if (response.status === 401) return new Problem(headers().Authorization ? "The API key is wrong." : "The server asks for an API key.", true);
  if (response.status === 429) return new Problem(`The server is busy. Try again in ${wait || "a few"} s.`);
  if (error.code === "stopping") return new Problem("The server is stopping. Try again when it is back.");
  if (response.status >= 500) return new Problem(`Something is wrong with the server: ${said}`);
  if (error.code === "context_length_exceeded") return new Problem(`That is too long for this model: ${said}`);
  return new Problem(`The server refused it: ${said}`);
}

// The blocks of texts, as server/markdown.py makes them; for each text null where there are none, and it is shown as it is.
async function rendered(texts) {
  try {
    return (await (await call("render", { texts })).json()).rendered;
  } catch { return texts.map(() => null); }
}

// Yield what a stream sends, null for a sign of life. It has to end as streams do: else something broke it off.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Problem("The connection broke off.");
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      if (piece === "data: [DONE]") return;
      if (!piece.startsWith("data: ")) { yield null; continue; }
      const content = JSON.parse(piece.slice(6));
      if (content.error) throw new Problem(`The server broke off: ${content.error.message}`);
      yield content;
    }
  }
}

// What is sent of a chat, from a message on: answers without thoughts, and no two turns of one side in a row.
function sent(chat, from) {
  const found = [], system = $("system").value.trim();
  if (system) found.push({ role: "system", content: system });
  for (const { role, content } of chat.messages.slice(from)) {
    if (!content.trim()) continue;
    if (found.at(-1)?.role === role) found.at(-1).content += "\n\n" + content;
    else found.push({ role, content });
  }
  return found;
}

async function countTokens(chat, from, signal) {
  try {
    return (await (await call("tokenize", { model: chosenModel().id, messages: sent(chat, from) }, signal)).json()).count;
  } catch (error) {
    if (error.name === "AbortError" || error.needsKey) throw error;
    return null;  // then the answer's request says what is wrong
  }
}

function numberIn(id) {
  const value = Number($(id).value);
  return $(id).value.trim() !== "" && $(id).checkValidity() && Number.isFinite(value) ? value : undefined;
}

// Where the chat does not fit, forget its oldest turns, and some more, so that it does not happen again at once.
async function fit(chat, signal) {
  const most = chosenModel().max_model_len;
  if (!most) return;
  const room = Math.min(numberIn("most") ?? Infinity, Math.floor(most / 4));
  let count = await countTokens(chat, chat.from, signal);
  if (count === null) return;
  const starts = chat.messages.map((each, at) => each.role === "user" && at > chat.from ? at : -1).filter((at) => at > 0);
  if (count + room > most && starts.length) {
    let low = 0, high = starts.length - 1;
    while (low < high) {  // the first turn from which on it fits
      const middle = (low + high) >> 1, found = await countTokens(chat, starts[middle], signal);
      if (found !== null && found + room <= most * 3 / 4) high = middle;
      else low = middle + 1;
    }
    chat.from = starts[high];
    count = await countTokens(chat, chat.from, signal) ?? count;
  }
  if (count >= most) throw new Problem(`That is too long for this model: ${format(count)} tokens with the system prompt, and it reads ${format(most)} with the answer. Shorten it.`);
  chat.used = count;
}

function question(chat, continues) {
  const asked = { messages: sent(chat, chat.from), stream: true, stream_options: { include_usage: true } };
  if (chosenModel().id) asked.model = chosenModel().id;
  if (continues) Object.assign(asked, { continue_final_message: true, add_generation_prompt: false });
  const given = { temperature: numberIn("temperature"), top_p: numberIn("top_p"), max_tokens: numberIn("most") };
  for (const [name, value] of Object.entries(given)) if (value !== undefined) asked[name] = value;
  return asked;
}
