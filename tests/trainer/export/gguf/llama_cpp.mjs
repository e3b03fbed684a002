// Tokenizes texts and answers prompts with llama.cpp, greedily. Reads a job from stdin and writes the result to a file.
//
// job: {"package": path of node-llama-cpp, "model": path, "texts": [...], "prompts": [...], "tokens": number,
//       "result": path of the result}
// result: {"texts": [[id, ...], ...], "answers": [[id, ...], ...], "seconds": number}
import fs from "node:fs";
import { pathToFileURL } from "node:url";

const job = JSON.parse(fs.readFileSync(0, "utf8"));
const { getLlama } = await import(pathToFileURL(job.package).href);
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, logLevel: "error", maxThreads: 2 });
const model = await llama.loadModel({ modelPath: job.model, gpuLayers: 0 });
const texts = job.texts.map((text) => Array.from(model.tokenize(text, true)));
const context = await model.createContext({ contextSize: 1024, threads: 2 });
const sequence = context.getSequence();
const answers = [];
let seconds = 0;
for (const prompt of job.prompts) {
  await sequence.clearHistory();
  const answer = [];
  const started = performance.now();
  for await (const token of sequence.evaluate(model.tokenize(prompt, true), { temperature: 0 })) {
    if (model.isEogToken(token)) break;
    answer.push(token);
    if (answer.length >= job.tokens) break;
  }
  seconds += (performance.now() - started) / 1000;
  answers.push(answer);
}
fs.writeFileSync(job.result, JSON.stringify({ texts, answers, seconds }));
process.exit(0);
