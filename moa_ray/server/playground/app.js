import { events, graph, graphs, judge } from "./stream.js";
import { RunView } from "./run.js";

const $ = (id) => document.getElementById(id);
const PAST = "moa-ray past runs";
const MOST_PAST = 50;
let running = null;

function tell(problem) {
  $("problem").textContent = problem;
}

// ---------------------------------------------------------------- what can be asked

async function fillGraphs() {
  try {
    const names = await graphs($("key").value);
    for (const select of [$("graph"), $("beside")]) {
      const chosen = select.value;
      const first = select.id === "beside" ? [new Option("nothing", "")] : [];
      select.replaceChildren(...first, ...names.map((name) => new Option(name, name)));
      if (names.includes(chosen)) select.value = chosen;
    }
    tell("");
  } catch (error) {
    tell(error.message);
  }
}

// ---------------------------------------------------------------- a question

async function follow(view, name, question, key, signal) {
  try {
    for await (const event of events(name, question, key, signal)) view.add(event);
  } catch (error) {
    if (!view.ended) view.fail(error.name === "AbortError" ? "stopped" : error.message);
  }
}

async function ask(names, question) {
  stop();
  tell("");
  const key = $("key").value;
  const controller = (running = new AbortController());
  busy(true);
  try {
    const drawn = await Promise.all(names.map((name) => graph(name, key)));
    const views = drawn.map((one) => new RunView(one, thumb));
    $("runs").replaceChildren(...views.map((view) => view.root));
    await Promise.all(views.map((view, n) => follow(view, names[n], question, key, controller.signal)));
    remember(names, question, views.map((view) => view.answerText));
  } catch (error) {
    tell(error.message);
  }
  if (running === controller) busy(false);
}

function stop() {
  running?.abort();
  busy(false);
}

function busy(is) {
  $("stop").disabled = !is;
  $("runs").setAttribute("aria-busy", String(is));
  if (!is) running = null;
}

async function thumb(view, which) {
  const said = view.thumbs.querySelector("[role=status]");
  try {
    await judge(view.id, which, $("key").value);
    said.textContent = "Thank you.";
  } catch (error) {
    said.textContent = error.message;
  }
}

// ---------------------------------------------------------------- past runs, in this browser alone

const past = () => JSON.parse(localStorage.getItem(PAST) ?? "[]");

function remember(names, question, answers) {
  const kept = [{ names, question, answers, when: new Date().toISOString() }, ...past()].slice(0, MOST_PAST);
  localStorage.setItem(PAST, JSON.stringify(kept));
  drawPast();
}

function drawPast() {
  $("past").replaceChildren(
    ...past().map(({ names, question, answers, when }) => {
      const item = document.createElement("li");
      const again = document.createElement("button");
      again.type = "button";
      again.className = "again";
      again.textContent = question;
      again.title = "Ask again";
      again.addEventListener("click", () => {
        $("question").value = question;
        [$("graph").value, $("beside").value] = [names[0], names[1] ?? ""];
        ask(names, question);
      });
      const told = document.createElement("small");
      told.textContent = ` ${names.join(" and ")}, ${new Date(when).toLocaleString()}: ${answers.join(" | ").slice(0, 160)}`;
      item.append(again, told);
      return item;
    }),
  );
}

// ---------------------------------------------------------------- wiring

$("ask").addEventListener("submit", (submit) => {
  submit.preventDefault();
  ask([$("graph").value, $("beside").value].filter(Boolean), $("question").value);
});
$("question").addEventListener("keydown", (key) => {
  if (key.key === "Enter" && (key.ctrlKey || key.metaKey)) $("ask").requestSubmit();
});
document.addEventListener("keydown", (key) => key.key === "Escape" && running && stop());
$("stop").addEventListener("click", stop);
$("key").addEventListener("change", () => {
  sessionStorage.setItem("moa-ray key", $("key").value);
  fillGraphs();
});
$("forget").addEventListener("click", () => {
  localStorage.removeItem(PAST);
  drawPast();
});
$("theme").addEventListener("click", () => {
  const dark = $("theme").getAttribute("aria-pressed") !== "true";
  $("theme").setAttribute("aria-pressed", String(dark));
  document.documentElement.dataset.theme = dark ? "dark" : "light";
});

const dark = matchMedia("(prefers-color-scheme: dark)").matches;
$("theme").setAttribute("aria-pressed", String(dark));
$("key").value = sessionStorage.getItem("moa-ray key") ?? "";
drawPast();
fillGraphs();
