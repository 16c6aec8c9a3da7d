// What screen readers are told of what happens on the page: one sentence at a time, and never token by token.

const region = document.getElementById("status");
const SHORT = 400; // characters of an answer that is read out when it is finished

export function say(text) {
  region.textContent = "";
  // The same words twice are two pieces of news only if the region was empty in between.
  setTimeout(() => { region.textContent = text; }, 50);
}

// What is said of an answer that has ended.
export function endingWords(answer) {
  if (answer.state === "stopped") return "Stopped.";
  if (answer.state === "failed") return `The answer failed. ${answer.error}`;
  const words = answer.text.split(/\s+/).filter(Boolean).length;
  return answer.text.length <= SHORT ? `Answer: ${answer.text}` : `Answer finished, ${words} words.`;
}
