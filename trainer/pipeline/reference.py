"""What a version keeps of its data for later: a sample of the prompts, the space to compare others in, what it
learnt, and a summary in numbers.

Nothing of these is written before a version is registered, and no stage reads them. Knows nothing of answers and of
how traffic is compared.
"""

from pathlib import Path

from svc.dataset.drift_sample import DRIFT_SAMPLE_FILE, draw_drift_sample
from svc.dataset.prompt_hashes import TRAINED_PROMPTS_FILE, hash_prompts, write_prompt_hashes
from svc.dataset.readers.reader import write_examples
from svc.dataset.summary import DATA_SUMMARY_FILE, summarize_data
from svc.text_embedding import TEXT_SPACE_FILE, fit_text_space, save_text_space
from trainer.pipeline.examples import Examples


def write_data_reference(folder: Path, examples: Examples, seed: int) -> None:
    """Writes the four files.

    Args:
        folder: the reference folder of a run.
        seed: of the sample.
    """
    drawn = draw_drift_sample(examples.given, seed)
    write_examples(folder / DRIFT_SAMPLE_FILE, drawn.sample)
    space = fit_text_space([example.question for example in drawn.rest], [example.answer for example in drawn.rest])
    save_text_space(folder / TEXT_SPACE_FILE, space)
    summary = summarize_data(examples.train, examples.heldout, examples.general)
    (folder / DATA_SUMMARY_FILE).write_text(summary.model_dump_json(), "utf-8")
    write_prompt_hashes(folder / TRAINED_PROMPTS_FILE, hash_prompts(examples.train))
