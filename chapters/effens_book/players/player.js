document.querySelectorAll(".$kind").forEach(function (root) {
  var controls = root.querySelector(".controls");
  if (!controls || root.effensStarted) return;
  root.effensStarted = true;
  var image = root.querySelector("img"), slider = root.querySelector("input"), button = root.querySelector("button");
  var output = root.querySelector("output"), frames = JSON.parse(root.querySelector("script").textContent);
  var calm = matchMedia("(prefers-reduced-motion: reduce)"), timer = 0, last = frames.length - 1;
  function show(i) {
    slider.value = i;
    $show;
    image.alt = frames[i][1];
    output.textContent = frames[i][2];
    slider.setAttribute("aria-valuetext", frames[i][2]);
  }
  function pause() {
    clearInterval(timer);
    timer = 0;
    button.textContent = calm.matches ? "Next" : "Play";
    output.setAttribute("aria-live", "polite");
  }
  function step() {
    show(Math.min(+slider.value + 1, last));
    if (+slider.value === last || !root.isConnected) pause();
  }
  button.addEventListener("click", function () {
    if (timer) return pause();
    var again = +slider.value === last;
    if (calm.matches) return show(again ? 0 : +slider.value + 1);
    if (again) show(0);
    output.setAttribute("aria-live", "off");
    button.textContent = "Pause";
    timer = setInterval(step, $interval);
  });
  slider.addEventListener("input", function () { pause(); show(+slider.value); });
  calm.addEventListener("change", pause);
  // Notebooks bind the arrow keys to their own commands.
  root.addEventListener("keydown", function (event) { event.stopPropagation(); });
  show($first);
  pause();
  controls.hidden = false;
});
