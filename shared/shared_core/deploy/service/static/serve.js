// The page of the service: every dropped or chosen file is sent to /predict on its own, two at a
// time, and shown with what came back. Nothing is loaded from elsewhere.
"use strict";

const TEXTS = {
  en: {
    loading: "loading the model's facts ...",
    drop: "Drop images here",
    or: "or click to choose them: JPEG, PNG, BMP, TIFF, WebP",
    facts: (m) => `${m.architecture}: ${m.task === "embed" ? "features" : `${m.class_names.length} classes`}, `
      + `${m.input_size.join(" x ")} pixels, ${m.runtime}`,
    unknown: "unknown: none of the classes",
    feature: (n) => `a feature of ${n} numbers`,
    left: (name, share) => name === "final" ? "ran to the end" : `left early at ${name}, ${share} % of the work`,
    waiting: "waiting ...",
    working: (open) => `${open} to go`,
    done: (good, bad) => `${good} classified` + (bad ? `, ${bad} refused` : ""),
    offline: "the service does not answer",
    other: "中文",
  },
  zh: {
    loading: "正在读取模型信息……",
    drop: "把图片拖到这里",
    or: "或点击选择：JPEG、PNG、BMP、TIFF、WebP",
    facts: (m) => `${m.architecture}：${m.task === "embed" ? "特征" : `${m.class_names.length} 个类别`}，`
      + `${m.input_size.join(" x ")} 像素，${m.runtime}`,
    unknown: "未知：不属于任何类别",
    feature: (n) => `${n} 个数的特征`,
    left: (name, share) => name === "final" ? "运行到最后" : `提前退出于 ${name}，只用了 ${share} % 的计算`,
    waiting: "等待中……",
    working: (open) => `还剩 ${open} 张`,
    done: (good, bad) => `已分类 ${good} 张` + (bad ? `，${bad} 张被拒绝` : ""),
    offline: "服务没有响应",
    other: "English",
  },
};
const AT_ONCE = 2;
const MOST_CARDS = 200;

const drop = document.getElementById("drop");
const files = document.getElementById("files");
const status = document.getElementById("status");
const results = document.getElementById("results");
const template = document.getElementById("card");
const queue = [];
let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
let facts = null;
let running = 0;
let good = 0;
let bad = 0;

function translate() {
  const texts = TEXTS[language];
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = texts[element.dataset.text];
  }
  if (facts) {
    document.title = facts.project;
    document.getElementById("title").textContent = facts.project;
    document.getElementById("model").textContent = texts.facts(facts);
  }
  document.getElementById("language").textContent = texts.other;
  count();
}

function count() {
  const texts = TEXTS[language];
  const open = queue.length + running;
  status.textContent = open ? texts.working(open) : good + bad ? texts.done(good, bad) : "";
  document.body.dataset.state = open ? "working" : "idle";
}

function add(list) {
  for (const file of list) {
    const card = template.content.firstElementChild.cloneNode(true);
    const image = card.querySelector("img");
    image.src = URL.createObjectURL(file);
    image.onload = () => URL.revokeObjectURL(image.src);
    image.onerror = () => {
      URL.revokeObjectURL(image.src);
      image.onerror = null;
      image.setAttribute("src", "");
    };
    card.querySelector(".file").textContent = file.name;
    card.querySelector(".answer").textContent = TEXTS[language].waiting;
    results.prepend(card);
    queue.push({ file, card });
  }
  while (results.childElementCount > MOST_CARDS) results.lastElementChild.remove();
  work();
}

function work() {
  while (running < AT_ONCE && queue.length) {
    const { file, card } = queue.shift();
    running += 1;
    ask(file, card).then((done) => {
      if (done) good += 1; else bad += 1;
      running -= 1;
      work();
    });
  }
  count();
}

async function ask(file, card) {
  const answer = card.querySelector(".answer");
  try {
    const form = new FormData();
    form.append("file", file);
    const response = await fetch("predict?top=3", { method: "POST", body: form });
    const body = await response.json();
    if (!response.ok) throw new Error(body.error.message);
    const [prediction] = body.predictions;
    show(prediction, answer, card.querySelector(".exit"));
    for (const one of prediction.top ?? []) {
      const row = document.createElement("li");
      const bar = document.createElement("progress");
      bar.max = 1;
      bar.value = one.probability;
      row.append(one.class, span(`${(100 * one.probability).toFixed(1)} %`), bar);
      card.querySelector(".bars").append(row);
    }
    return true;
  } catch (error) {
    card.classList.add("fault");
    answer.textContent = error instanceof TypeError ? TEXTS[language].offline : error.message;
    return false;
  }
}

function show(prediction, answer, exit) {
  const texts = TEXTS[language];
  if (prediction.feature) answer.textContent = texts.feature(prediction.feature.length);
  else if (facts && prediction.class === "unknown" && !facts.class_names.includes("unknown")) {
    answer.textContent = texts.unknown;
  } else answer.textContent = prediction.class;
  if (prediction.exit && facts) {
    const full = facts.exits.at(-1).macs;
    exit.textContent = texts.left(prediction.exit, Math.round((100 * prediction.macs) / full));
  }
}

function span(text) {
  const element = document.createElement("span");
  element.textContent = text;
  return element;
}

for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  // The whole window takes a drop: a file that misses the frame must not replace the page.
  window.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") add(event.dataTransfer.files);
  });
}
files.addEventListener("change", () => {
  add([...files.files]);
  files.value = "";
});
document.getElementById("language").addEventListener("click", () => {
  language = language === "en" ? "zh" : "en";
  translate();
});

translate();
fetch("model").then((response) => response.json()).then((found) => {
  facts = found;
  translate();
}).catch(() => {
  document.getElementById("model").textContent = TEXTS[language].offline;
});
