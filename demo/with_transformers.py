"""ssToken in another trainer: Algorithm 1 as a class for transformers' Trainer or TRL's, on the demo's rows and model.

    python demo/with_transformers.py [--trl]    # needs transformers, peft, accelerate, datasets, trl
    python evaluate.py --model demo/model --adapter runs/demo-transformers --tasks instructions --data demo

To take along: sstoken.py, and `SSToken` in front of your trainer's class. The model is one of peft. A batch's rows are
samples, padded on either side, the label -100 where nothing is supervised. Several turns are fine, packed rows are not.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
from sstoken import AttentionProbe, normalize, retrospective_excess_loss, score, select, selected_loss


class SSToken:
    """The loss of Algorithm 1, its history the base model, in front of a trainer: `class Mine(SSToken, Trainer)`."""

    rho, gamma, layer, probe = 0.6, 0.5, -1, None
    loss_is_scaled_for_ga = True  # compute_loss divides by the samples of a whole step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, and the samples of all processes that have a supervised token: Eq. 10's weights."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        samples = sum((batch["labels"][:, 1:] != -100).any(dim=1).sum().item() for batch in batches)
        return batches, self.accelerator.gather(torch.tensor(samples, device=device)).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # held-out rows: the loss of all their tokens
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        adapted = self.accelerator.unwrap_model(model)
        self.probe = self.probe or AttentionProbe(adapted, self.layer)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        response = F.pad(inputs["labels"][:, 1:] != -100, (1, 0))  # nothing predicts a row's first token

        def losses():  # of the response tokens, row after row: that of x_i comes from position i - 1
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            return F.cross_entropy(logits[response[:, 1:]].float(), ids[response], reduction="none")

        with torch.no_grad(), adapted.disable_adapter():
            history_nll = losses()  # L_his
        nll = losses()  # L_theta
        rel = retrospective_excess_loss(nll.detach(), history_nll)  # Alg. 1, line 5
        attention = self.probe.scores(response, mask)[response]  # Alg. 1, line 6
        loss, sizes = 0 * nll.sum(), response.sum(dim=1).tolist()
        for nll_i, rel_i, attention_i in zip(*(x.split(sizes) for x in (nll, rel, attention)), strict=True):
            if len(nll_i):
                selected = select(score(normalize(rel_i), attention_i, self.gamma), self.rho)  # Alg. 1, lines 7 to 9
                loss = loss + selected_loss(nll_i, selected)  # Eq. 10
        return loss * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)  # DDP takes the mean of these


def train(base=Trainer, arguments=TrainingArguments, folder="runs/demo-transformers", **more):
    """Fine-tune the demo's model on its rows, by `base` with SSToken in front; `more` goes to `arguments`."""
    place = Path(__file__).parent
    tokenizer = AutoTokenizer.from_pretrained(place / "model", pad_token="<|end|>")
    rows, _ = data.load_examples(f"{place}/sft.jsonl", data.load_tokenizer(place / "model"), max_length=128)
    rows = Dataset.from_list([{"input_ids": row.ids, "labels": row.ids.where(row.response, -100)} for row in rows])
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, target_modules="all-linear"))
    settings = {"num_train_epochs": 4, "learning_rate": 4e-3, "warmup_steps": 0.03, "max_grad_norm": 0, "report_to": []}
    settings |= {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    collate = DataCollatorForSeq2Seq(tokenizer)
    trainer = type("Mine", (SSToken, base), {})(model, arguments(folder, **settings | more), collate, rows)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    train(*((SFTTrainer, SFTConfig) if "--trl" in sys.argv else ()))
