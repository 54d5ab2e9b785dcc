from pathlib import Path

from dery_cli.types import InputSpec, ModelCard

MODELS = {"large": "resnet18", "small": "mobilenetv3_small_050"}


class BirdZoo:
    def list_models(self):
        return list(MODELS)

    def card(self, model):
        if model not in MODELS:
            raise KeyError(model)
        return ModelCard(
            input=InputSpec(image_size=(96, 96)),
            license="MIT",
            task="200 species of birds",
            source="https://example.org/birds",
        )

    def build(self, model, *, pretrained, image_size=None):
        import timm

        network = timm.create_model(MODELS[model], num_classes=200)
        if pretrained:
            from safetensors.torch import load_file

            network.load_state_dict(load_file(Path(__file__).with_name(f"{model}.safetensors")))
        return network.eval()


zoo = BirdZoo()
