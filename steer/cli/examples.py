"""An example of each command, which its `--help` ends with."""

EXAMPLES = {
    "serve": "steer serve Qwen/Qwen3-0.6B --directions directions --port 8000",
    "inspect": "steer inspect directions/refusal.safetensors",
    "fit": "steer fit MODEL --harmful harmful.txt --harmless harmless.txt -o directions/refusal.safetensors",
    "measure": "steer measure MODEL --harmful harmful.txt --harmless harmless.txt --vectors "
    "-o model.measurement.safetensors",
    "derive": "steer derive model.measurement.safetensors --method slerp --t 0.5 --layer 14 "
    "-o directions/refusal.safetensors",
    "methods": "steer methods slerp",
    "convert": "steer convert refusal.gguf directions/refusal.safetensors --model MODEL",
    "bake": "steer bake MODEL --direction directions/refusal.safetensors --mode ablate -o model-without-refusal",
    "push": "steer push directions/refusal.safetensors OWNER/NAME --private",
    "pull": "steer pull OWNER/NAME -o directions/refusal.safetensors",
    "eval": "steer eval MODEL --direction directions/refusal.safetensors --harmful held-out.txt "
    "--harmless harmless.txt --report report",
    "select": "steer select model.measurement.safetensors MODEL --harmful harmful.txt --harmless harmless.txt "
    "-o directions/refusal.safetensors",
    "search": "steer search MODEL --harmful harmful.txt --harmless harmless.txt --folder search --trials 200",
    "trials": "steer trials search --save 17 -o directions/refusal.safetensors",
    "keys new": "steer keys new alice --policy policy.toml --direction refusal --readout",
    "keys list": "steer keys list --policy policy.toml",
    "audit verify": "steer audit verify audit.log",
    "on": "steer on --url http://127.0.0.1:8000",
    "off": "steer off --reason 'answers look wrong'",
}
