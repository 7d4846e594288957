// Runs before the page is drawn, so that a dark page does not flash white: apply the theme that was chosen.
try {
  document.documentElement.dataset.theme = localStorage.getItem("jojo.theme") ?? "auto";
} catch {
  // A browser without storage follows the system.
}
